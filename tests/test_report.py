"""The report of runs: what it reads, computes and says, also of damaged runs."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shutil
from pathlib import Path

import browser
import pytest
from PIL import Image
from tiny_world import ROOT
from written_runs import PROMPTS, training, validation, write_records, write_run

from mixgrpo.commands import main
from mixgrpo.config import Config, RewardConfig
from mixgrpo.report.charts import (
    Chart,
    metric_charts,
    other_keys,
    phase_chart,
    points,
    reward_charts,
    running_mean,
    thinned,
    window_chart,
)
from mixgrpo.report.page import STATIC, report_html, warnings
from mixgrpo.report.pictures import make_album, picks, spread
from mixgrpo.report.runs import read_run, read_runs
from mixgrpo.report.summary import summarize
from mixgrpo.report.tables import knob_tables, score_table, time_table


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def text_of(fragment: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", fragment)).split())


def lines(chart: Chart | None) -> dict[tuple[int, str, str], tuple]:
    assert chart is not None
    return {(line.run, line.label, line.kind): line.values for line in chart.lines}


# ---- reading


def test_a_whole_run_lacks_nothing(run):
    found = read_run(run)
    assert found.missing == ()
    assert (found.name, found.done, found.planned, found.revision) == ("run", 4, 4, "abc123")
    assert found.weights == {"hpsv2": 1.0, "judge": 0.0}
    assert [stage.iteration for stage in found.stages] == [0, 4]
    assert found.stages[0].prompts == PROMPTS
    assert found.stages[0].scores["judge"] == (1.0, 0.0, None)


def half_a_line(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "rew')


def bad_lines(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text().splitlines()
    text[1:3] = ["\x00\x00", "[1, 2]"]
    (run / "metrics.jsonl").write_text("\n".join(text))


def no_iteration(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": true, "reward/hpsv2": 1}\n')


def damaged_picture(run: Path) -> None:
    file = run / "pictures" / "iteration_00000004" / "001.png"
    file.write_bytes(file.read_bytes()[:40])


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def deep_line(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines.insert(2, '{"a":' * 99999)
    (run / "metrics.jsonl").write_text("\n".join(lines))


DAMAGE = {
    "the last line of metrics.jsonl is incomplete": half_a_line,
    "2 of 6 lines of metrics.jsonl are not whole records; what can be read": bad_lines,
    "lines of metrics.jsonl are not whole records; what can be read of them is shown": no_iteration,
    "there is no metrics.jsonl: no curves": lambda run: (run / "metrics.jsonl").unlink(),
    "metrics.jsonl has no records yet": lambda run: (run / "metrics.jsonl").write_text(""),
    "there is no config.json: the configuration is unknown": lambda run: (
        run / "config.json"
    ).unlink(),
    "config.json cannot be read": lambda run: (run / "config.json").write_text('{"revision'),
    "config.json cannot be read (is a FIFO, not a regular file)": lambda run: fifo(
        run / "config.json"
    ),
    "config.json cannot be read (is not valid JSON (the name 'a' occurs twice": lambda run: (
        run / "config.json"
    ).write_text('{"a": 1, "a": 2}'),
    "metrics.jsonl cannot be read (is a FIFO, not a regular file): no curves": lambda run: fifo(
        run / "metrics.jsonl"
    ),
    "metrics.jsonl cannot be read (is larger than 256 MiB": lambda run: os.truncate(
        run / "metrics.jsonl", 2**40
    ),
    "1 of 7 lines of metrics.jsonl are not whole records": deep_line,
    "001.png cannot be read as an image: it is a FIFO": lambda run: fifo(
        run / "pictures" / "iteration_00000004" / "001.png"
    ),
    "001.png cannot be read as an image: it has more than 33.6": lambda run: Image.new(
        "1", (9000, 9000)
    ).save(run / "pictures" / "iteration_00000004" / "001.png"),
    "no scores are stored with the images of iteration 4": lambda run: fifo(
        run / "pictures" / "iteration_00000004" / "scores.json"
    ),
    "config.json has no `config`": lambda run: (run / "config.json").write_text('{"a": 1}'),
    "there are no validation images": lambda run: shutil.rmtree(run / "pictures"),
    "images are missing at iteration 4": lambda run: (
        run / "pictures" / "iteration_00000004" / "002.png"
    ).unlink(),
    "iteration_00000004/001.png cannot be read as an image": damaged_picture,
    "no scores are stored with the images of iteration 0": lambda run: (
        run / "pictures" / "iteration_00000000" / "scores.json"
    ).write_text("[]"),
}


@pytest.mark.parametrize("sentence", DAMAGE)
def test_a_damaged_run_has_a_report_that_says_what_is_missing(run, sentence):
    DAMAGE[sentence](run)
    page = report_html([read_run(run)])
    notes = re.findall(r'<ul class="missing">(.*?)</ul>', page, re.DOTALL)
    assert len(notes) == 1
    assert sentence in text_of(notes[0])
    assert notes[0].count("<li>") == 1, "one cause, one sentence"
    assert data_of(page)["runs"] == ["run"]


def test_nothing_but_an_empty_file_of_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    page = report_html([read_run(tmp_path, "early")])
    assert "0 of unknown iterations" in page
    for sentence in ("No validation is on record", "No times are", "No configuration is"):
        assert sentence in page
    assert not any(data_of(page)["sections"].values())


def test_without_a_configuration_rewards_tell_themselves_apart(run):
    (run / "config.json").unlink()
    assert read_run(run).weights == {"hpsv2": 1.0, "judge": 0.0}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (None, "error: there is no folder"),
        (Path.mkdir, "holds none of config.json, metrics.jsonl, pictures; give the --run.folder"),
    ],
)
def test_a_folder_that_is_no_run_is_one_sentence(tmp_path, capsys, make, sentence):
    if make:
        make(tmp_path / "x")
    assert main(["report", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_two_runs_of_one_name_need_names(run, tmp_path):
    other = write_run(tmp_path / "elsewhere" / "run")
    with pytest.raises(ValueError, match=r"both named 'run'; give one of them another name: NAME="):
        read_runs([str(run), str(other)])
    assert [each.name for each in read_runs([str(run), f"two={other}"])] == ["run", "two"]


# ---- curves


def test_reward_curves_are_training_validation_and_average(run):
    (trained,) = reward_charts([read_run(run)], trained=True)
    assert trained.x == (0, 1, 2, 3, 4)
    found = lines(trained)
    assert found[0, "", "raw"] == (None, 0.125, 0.25, 0.375, 0.5)
    assert found[0, "training", "mean"] == (None, 0.125, 0.1875, 0.3125, 0.4375)
    assert found[0, "validation", "dots"] == (0.25, None, None, None, 0.75)
    (held_out,) = reward_charts([read_run(run)], trained=False)
    assert (held_out.title, len(held_out.lines)) == ("judge", 1)


def test_the_window_lies_between_two_lines(run):
    found = lines(window_chart([read_run(run)]))
    assert found[0, "start", "low"] == (0, 1, 2, 3)
    assert found[0, "end", "high"] == (5, 6, 7, 8)


def test_phases_are_stacked_without_what_was_hidden(run):
    chart = phase_chart(read_run(run), 0)
    assert chart is not None
    assert [(line.label, line.values[0], line.shown[0]) for line in chart.lines] == [
        ("Rollout", 2.0, 2.0), ("Rewards, waited for", 2.5, 0.5), ("Update", 4.0, 1.5)
    ]  # fmt: skip


def test_runs_with_different_metrics_share_what_they_share(run, tmp_path):
    other = write_run(tmp_path / "other")
    write_records(other, [{**training(i), "update/kl": 0.1, "new/metric": 2.0} for i in (1, 2)])
    runs = read_runs([str(run), str(other)])
    charts = {c.key: c for c in metric_charts(runs, ["update/kl", "update/grad_norm", "nothing"])}
    assert set(charts) == {"update/kl", "update/grad_norm"}
    assert charts["update/kl"].note == "not in run"
    assert charts["update/grad_norm"].note == ""
    assert lines(charts["update/grad_norm"])[1, "", "plain"] == (1.0, 0.5, None, None)
    assert other_keys(runs) == ["new/metric"], "failures that never were are not shown"
    (judge,) = reward_charts(runs, trained=False)
    assert judge.note == "not in other"


def test_long_curves_are_thinned_to_means():
    found = thinned({iteration: float(iteration) for iteration in range(1, 2001)})
    assert len(found) == 1000
    assert (found[2], found[2000]) == (1.5, 1999.5)
    assert thinned({}) == {}
    assert running_mean({1: 0.0, 2: 4.0, 3: 8.0}) == {1: 0.0, 2: 2.0, 3: 6.0}


# ---- pictures


def test_the_best_the_worst_and_the_most_improved(run):
    album = make_album([read_run(run)])
    assert album.prompts == list(PROMPTS)
    assert set(album.runs[0]) == {0, 4}
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in album.runs[0][4].values())
    of_hpsv2 = album.picks[0]["hpsv2"]
    assert of_hpsv2 == {"best": [1, 0, 2], "worst": [2, 0, 1], "improved": [1, 0, 2]}
    assert album.picks[0]["judge"]["improved"] == [1], "what had no score before did not improve"
    assert album.picks[0]["all"]["best"][0] == 1
    assert picks({}) == {}


def test_a_prompt_has_one_place_in_all_runs(run, tmp_path):
    other = write_run(tmp_path / "other")
    for stage in (other / "pictures").iterdir():
        kept = json.loads((stage / "scores.json").read_text())
        kept["prompts"] = [PROMPTS[2], "another", PROMPTS[2]]
        (stage / "scores.json").write_text(json.dumps(kept))
    album = make_album(read_runs([str(run), str(other)]))
    assert album.prompts == [*PROMPTS, "another", PROMPTS[2]]
    assert list(album.runs[1][4]) == [2, 3, 4]


def test_of_many_validations_some_are_shown_with_the_ends(run):
    (stage,) = read_run(run).stages[:1]
    shown = spread([stage] * 40, 12)
    assert len(shown) == 12
    numbered = spread(list(range(40)), 4)  # type: ignore[arg-type]
    assert numbered == [0, 13, 26, 39]


# ---- words


def test_the_warning_of_reward_hacking_is_repeated(run):
    rising = [validation(i, 0.1 * i, 1 - 0.1 * i) for i in range(5)]
    write_records(run, rising)
    found = read_run(run)
    assert list(warnings(found)) == [3, 4], "patience is 3"
    card = re.search(
        r'<p class="warning">Warning at iteration 3, 4: (.*?)</p>', report_html([found])
    )
    assert card
    assert "this may be reward hacking" in card[1]


def test_scores_of_other_prompts_are_told_apart(run, tmp_path):
    same, other = write_run(tmp_path / "same"), write_run(tmp_path / "other")
    saved = json.loads((other / "config.json").read_text())
    saved["config"]["validation"]["seed"] += 1
    (other / "config.json").write_text(json.dumps(saved))
    assert "are not comparable" not in score_table(read_runs([str(run), str(same)]))
    found = score_table(read_runs([str(run), str(other)]))
    assert "These runs differ in validation.seed: their scores are not comparable." in found


@pytest.mark.parametrize(
    ("iterations", "said"),
    [
        ((), "No validation is on record."),
        ((0,), "hpsv2 0.2500 - - -"),
        ((4,), "hpsv2 - 0.2500 - -"),
        ((2, 4), "hpsv2 - 0.2500 - -"),
    ],
)
def test_scores_before_and_after_are_not_made_up(run, iterations, said):
    write_records(run, [training(1), *(validation(i, 0.25, 0.5) for i in iterations)])
    assert said in text_of(score_table([read_run(run)])).replace("\N{EN DASH}", "-")


def test_small_scores_are_ranked(run):
    for stage in (run / "pictures").iterdir():
        kept = json.loads((stage / "scores.json").read_text())
        kept["scores"] = {"small": [1e-5, 3e-5, 2e-5]}
        (stage / "scores.json").write_text(json.dumps(kept))
    assert make_album([read_run(run)]).picks[0]["small"]["best"] == [1, 2, 0]


def test_seconds_of_an_iteration_and_its_validation_add_up(run):
    write_records(run, [
        {**training(1), "seconds/save": 2.0}, {**validation(1, 0.5, 0.5), "seconds/save": 0.25}
    ])  # fmt: skip
    assert points(read_run(run), "seconds/save") == {1: 2.25}


def test_a_number_that_no_float_holds_is_none(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "reward/hpsv2": 1' + 400 * "0" + "}\n")
    assert read_run(run).records[-1] == {"iteration": 5}


def test_prompts_kept_with_the_pictures_count_before_the_file(run, tmp_path):
    """Which may have been edited since, and where scores.json is missing is all there is."""
    file = tmp_path / "prompts.txt"
    file.write_text("other\nprompts\nby\nnow\n")
    saved = json.loads((run / "config.json").read_text())
    saved["config"]["validation"]["prompts_file"] = str(file)
    (run / "config.json").write_text(json.dumps(saved))
    (run / "pictures" / "iteration_00000000" / "scores.json").unlink()
    assert make_album([read_run(run)]).prompts == list(PROMPTS)


def test_every_run_shows_prompts_of_its_own(run, tmp_path):
    other = write_run(tmp_path / "other")
    for stage in (other / "pictures").iterdir():
        kept = json.loads((stage / "scores.json").read_text())
        kept["prompts"] = [PROMPTS[0], "one", "two"]
        (stage / "scores.json").write_text(json.dumps(kept))
    album = make_album(read_runs([str(run), str(other)]))
    assert album.shown == [[0, 1, 2], [0, 3, 4]]


def test_score_table_says_before_after_change(run):
    found = text_of(score_table([read_run(run)]))
    assert "hpsv2 0.2500 0.7500 +0.5000" in found
    assert "judge held out 0.5000 0.3750 -0.1250" in found


def test_time_table_counts_what_the_run_waited_for(run):
    found = text_of(time_table([read_run(run)]))
    # 4 x (2 + 0.5 + 1.5) and two validations of 8 s.
    for part in ("Rollout 25% 8.0 s", "Validation 50% 16.0 s", "total 32.0 s"):
        assert part in found
    assert "Rewards, hidden 12.0 s" in found


def test_knobs_that_differ(run, tmp_path):
    other = write_run(tmp_path / "other", update={"clip": 0.5})
    found = text_of(knob_tables(read_runs([str(run), str(other)])))
    differing = found.split("All ")[0]
    assert "update.clip 0.0001 0.5" in differing
    assert "update.kl" not in differing
    alone = text_of(knob_tables([read_run(other)])).split("All ")[0]
    assert "update.clip 0.5 0.0001" in alone


def test_everything_from_outside_is_escaped(run):
    name = "</script><script>alert(1)</script><!--DATA-->"
    page = report_html([read_run(run, name)])
    assert "alert(1)</script>" not in page
    assert data_of(page)["runs"] == [name]


def test_the_library_is_the_published_one_with_its_licence(run):
    """dist/uPlot.iife.min.js of the npm package uplot 1.6.32: newer ones are put in whole."""
    code = (STATIC / "uPlot.iife.min.js").read_bytes()
    published = "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    assert hashlib.sha256(code).hexdigest() == published
    page = report_html([read_run(run)])
    assert "Permission is hereby granted" in page
    assert code.decode() in page


# ---- the command


def test_the_command_writes_into_the_runs_folder_or_where_it_is_told(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    told = tmp_path / "new" / "two.html"
    assert main(["report", f"a={run}", f"b={run}", "--output", str(told)]) == 0
    assert data_of(told.read_text())["runs"] == ["a", "b"]
    assert not list(told.parent.glob("partial_*"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: RUN"),
        (["RUN", "--outputs", "x"], "--outputs"),
        (
            ["RUN", "--output", "FOLDER"],
            "is a folder, not a regular file, so it is not replaced; name",
        ),
        (
            ["RUN", "--output", "/dev/null"],
            "/dev/null is a device, not a regular file, so it is not",
        ),
        (["RUN", "--output", "FIFO"], "is a FIFO, not a regular file, so it is not replaced"),
        (["RUN", "--output", "LINK"], "is a device, not a regular file, so it is not replaced"),
        (["RUN", "--output", "FILE/below.html"], "/file, which is not a folder; name another path"),
        (["RUN", "--output", "x" * 300], "cannot be written (File name too long); name another"),
        (["x" * 300], "there is no folder"),
        (["a=" + "x/" * 3000], "there is no folder"),
        (["FIFO"], "there is no folder"),
    ],
)
def test_mistaken_words_are_one_sentence(run, tmp_path, capsys, words, sentence):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/full")
    (tmp_path / "file").write_text("kept")
    places = {"RUN": run, "FOLDER": tmp_path, "FIFO": tmp_path / "fifo", "LINK": tmp_path / "link",
              "FILE/below.html": tmp_path / "file" / "below.html"}  # fmt: skip
    assert main(["report", *(str(places.get(word, word)) for word in words)]) == 1
    assert (tmp_path / "file").read_text() == "kept"
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_prompts_of_half_characters_and_a_name_that_is_no_utf_8(run, tmp_path):
    """Names of files may hold any bytes, and JSON may escape half a character."""
    for stage in (run / "pictures").iterdir():
        kept = json.loads((stage / "scores.json").read_text())
        kept["prompts"][0] = "half \ud800"
        (stage / "scores.json").write_text(json.dumps(kept))
    folder = run.rename(run.parent / "name\udcff")
    assert main(["report", str(folder)]) == 0
    data = data_of((folder / "report.html").read_text(encoding="utf-8"))
    assert data["runs"] == ["name\udcff"]
    assert data["album"]["prompts"][0] == "half \ud800"


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda file: Image.new("RGB", (8, 8)).save(file), "differ in size"),
        (fifo, "001.png cannot be read: it is a FIFO, not a regular file"),
        (lambda file: file.write_bytes(b""), "001.png cannot be read: it is not an image"),
    ],
)
def test_a_damaged_picture_does_not_fail_a_finished_training(run, harm, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = Config(rewards={name: RewardConfig("jpeg_size") for name in ("hpsv2", "judge")})
    config.validation.prompts_file = "data/shapes/prompts_test.txt"
    assert f"before and after: {run / 'before_after.png'}" in summarize(run, config)
    (run / "before_after.png").unlink()
    harm(run / "pictures" / "iteration_00000004" / "001.png")
    said = summarize(run, config)
    assert "before and after: not drawn, because" in said
    assert sentence in said
    assert not (run / "before_after.png").exists()


def test_a_training_ends_with_its_report(straight):
    page = (straight / "report.html").read_text()
    data = data_of(page)
    assert data["runs"] == ["run"]
    assert 'class="missing"' not in page
    assert [c["title"] for c in data["sections"]["trained"]] == ["redness", "contrast"]
    kept = json.loads((straight / "pictures/iteration_00000004/scores.json").read_text())
    last = [json.loads(s) for s in (straight / "metrics.jsonl").read_text().splitlines()][-1]
    for name, values in kept["scores"].items():  # here all validation pictures are kept
        assert sum(values) / len(values) == pytest.approx(last[f"validation/{name}"], rel=1e-5)


# ---- in a browser


@pytest.fixture(scope="module")
def opened():
    """A page of a headless Chromium; without one, skipped, or failed where it is required."""
    program = browser.find()
    if program is None:
        required = os.environ.get("MIXGRPO_BROWSER") == "required"
        (pytest.fail if required else pytest.skip)("there is no Chromium")
    with browser.page(program) as page:
        yield page


CANVASES = "[...document.querySelectorAll('.uplot canvas')]"
INKED = (
    f"{CANVASES}.filter(c => c.getContext('2d').getImageData(0, 0, c.width, c.height)"
    ".data.some(byte => byte)).length"
)
PICTURES = "[...document.querySelectorAll('img')].filter(i => i.naturalWidth).length"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_two_runs_in_a_browser(opened, run, tmp_path, scheme, width):
    other = write_run(tmp_path / "other", update={"clip": 0.5})
    half_a_line(other)
    damaged_picture(other)
    file = tmp_path / "report.html"
    assert main(["report", str(run), str(other), "--output", str(file)]) == 0
    opened.complaints.clear()
    opened.requests.clear()
    opened.look(width, 900, scheme)
    opened.open(file)
    charts = sum(map(len, data_of(file.read_text())["sections"].values()))
    assert charts > 6
    assert opened.value(INKED) == charts, "every chart is drawn"
    assert opened.value("document.querySelectorAll('#album img').length") == 5
    assert opened.value("document.querySelector('#album .none').textContent") == "damaged"
    assert opened.value(PICTURES) == opened.value("document.querySelectorAll('img').length")
    assert opened.value("document.documentElement.scrollWidth") == width, "nothing sticks out"
    page, ink = opened.value(
        "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
    )
    assert (brightness(page) > brightness(ink)) == (scheme == "light")
    assert abs(brightness(page) - brightness(ink)) > 180
    opened.photograph(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert opened.complaints == []
    assert opened.requests == [file.as_uri()], "nothing but the file itself is asked for"


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_what_a_user_can_move(opened, run, tmp_path):
    other = write_run(tmp_path / "other")
    file = tmp_path / "report.html"
    assert main(["report", str(run), str(other), "--output", str(file)]) == 0
    opened.complaints.clear()
    opened.look(1280, 900)
    opened.open(file)
    assert opened.value("document.getElementById('stage-text').textContent") == "4"
    opened.value("(stage.value = 0, stage.dispatchEvent(new Event('input')))")
    assert opened.value("document.getElementById('stage-text').textContent") == "0"
    assert "iteration 0" in opened.value("document.querySelector('#album img').alt")
    captions = "[...document.querySelectorAll('#picks figcaption')].map(c => c.textContent)"
    opened.value("(measure.value = 'hpsv2', measure.dispatchEvent(new Event('change')))")
    assert opened.value(captions)[0] == f"0.9: {PROMPTS[1]}"
    opened.value("document.querySelector('[data-run=\"1\"]').click()")
    assert opened.value("document.querySelectorAll('#album img').length") == 3
    assert opened.value("plots.every(p => p.lines.every((line, i) => line.kind === 'area' "
                        "|| p.plot.series[i + 1].show === (line.run === 0)))")  # fmt: skip
    assert opened.complaints == []


def test_the_browser_would_have_told(opened, tmp_path):
    """What the other tests find absent is found where it is."""
    file = tmp_path / "bad.html"
    file.write_text(
        "<img src='missing.png'><script>console.error('told'); throw Error('thrown')</script>"
    )
    opened.complaints.clear()
    opened.requests.clear()
    opened.open(file)
    opened.value("0")
    assert any("told" in each for each in opened.complaints)
    assert any("thrown" in each for each in opened.complaints)
    assert (tmp_path / "missing.png").as_uri() in opened.requests
