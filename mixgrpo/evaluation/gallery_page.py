"""The HTML template of the gallery, with its style and the script that sorts it."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation</title>
<style>
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1c1a; --soft: #62625c;
  --line: #dcdcd6; --up: #14702f; --down: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #161615; --card: #222220; --ink: #ececea; --soft: #a3a39c; --line: #3a3a36;
    --up: #6fcf8a; --down: #ff8a80; }
}
body { margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { color: var(--soft); margin: .4rem 0; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .9rem 1rem; margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem 1.2rem .15rem 0; vertical-align: top;
  font-size: .9rem; white-space: nowrap; }
th { font-weight: 600; }
tr + tr > * { border-top: 1px solid var(--line); }
.pictures td { white-space: normal; padding: .4rem 1.2rem .4rem 0; min-width: 9rem; }
img { max-width: 100%; height: auto; min-width: 7rem; margin: 0 .3rem .3rem 0;
  vertical-align: top; border-radius: 3px; }
.missing { display: inline-block; width: 7rem; box-sizing: border-box; padding: .5rem;
  margin: 0 .3rem .3rem 0; border: 1px dashed var(--soft); color: var(--soft); font-size: .8rem;
  overflow-wrap: anywhere; vertical-align: top; }
i { font-style: normal; font-size: .85em; }
.up { color: var(--up); }
.down { color: var(--down); }
.label { font-size: .85rem; }
#sorting { margin: 1.2rem 0 0; }
select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 4px; padding: .1rem .3rem; }
</style>
<h1>Evaluation</h1>
<div class="scroll"><!--TABLE--></div>
<p><!--COUNT-->: the best, the worst and the most changed from <!--BASELINE-->, by <!--BY-->.
Scores are means over a prompt's images; the difference from <!--BASELINE--> is in small print.</p>
<p id="sorting" hidden>Sort by <select id="measure"><!--MEASURES--></select>
<select id="order"><option>as chosen<option>best<option>worst<option>most changed
<option>prompt</select></p>
<main>
<!--CARDS-->
</main>
<script>
const main = document.querySelector("main"), cards = [...main.children];
const measure = document.getElementById("measure"), order = document.getElementById("order");
const place = card => JSON.parse(card.dataset.places)[measure.value];
const last = (value, sign) => value === null ? Infinity : sign * value;
const ranks = {
  "as chosen": card => cards.indexOf(card),
  "best": card => last(place(card)[0], -1),
  "worst": card => last(place(card)[0], 1),
  "most changed": card => last(place(card)[1] === null ? null : Math.abs(place(card)[1]), -1),
  "prompt": card => Number(card.dataset.index),
};
function sort() {
  const ranked = cards.map(card => [ranks[order.value](card), card]);
  ranked.sort((a, b) => a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0);
  main.append(...ranked.map(pair => pair[1]));
}
measure.onchange = order.onchange = sort;
document.getElementById("sorting").hidden = false;
</script>
</html>
"""
