"""The score in a judge's reply: it counts where it is clear, and nowhere else."""

from __future__ import annotations

import re
import time

import pytest

from mixgrpo.rewards.completion import Failure
from mixgrpo.rewards.verdict import PATTERN, read_score, without_reasoning

DEFAULT = re.compile(PATTERN)
FOURS = r"""
4
4.
4!
4.000
04
+4
4/5
4 / 5.0
4/5.
4 out of 5
4 of 5.
4 (out of 5)
**4**
**4**/5
`4`
"4"
“4”
[4]
[4]/5
{4}
【4】
$4$
\(4\)
\boxed{4}
\boxed{4}.
\boxed{4}/5
\boxed{4/5}
$\boxed{4}$
$$ \boxed{ \text{4} } $$
<b>4</b>
<span class="x">4</span></p>
<|begin_of_box|>4<|end_of_box|>
4. That is all.
4, because 5 would need a tail.
4 since 2 of 3 zebras are there
""".strip().splitlines()
NO_FOURS = r"""
5e-1
4e0
4 out of 10
2 of 10
4/10
8/10
4 1/2
4½
4 ½
3 and 1/2
3 and a half
3 +/- 1
3 ± 1
3±1
2 x 2
2×2
2 * 2
2**2
2^2
2²
2 + 2 = 4
sqrt(16)
4,5
4, 5
1,000
4.5.1
4..5
4...
4. 5
4. or 5
4 5
4-5
4 – 5
4 - 1
4 to 5
4 or 5
4, maybe 5
4?
4;
4,
80%
4 percent
4+
4-
4th
4k
4ish
4'5
4:5
4 | 5
4°
4 points out of 10
4 (3.5 rounded)
4 of the 5 points
4/5/10
4/5 or 3/5
4/five
4 / -5
٤
４
④
⁴
IV
four
X
nan
-inf
1_0
0x4
~4
≈4
<4
>= 4
about 4
- 4
--4
[4, 5]
(4-5)
{4}{5}
\frac{4}{5}
\boxed{3}\frac{1}{2}
\boxed{3}.5
**4**.5
**4**5
~~3~~ 4
<s>3</s> 4
"4", "5"
-4
-0
0
6
5.01
""".strip().splitlines()  # noqa: RUF001
WHOLE_REPLIES = {
    "Final Score：4": 4,  # noqa: RUF001
    "Final Score [1 to 5]: 4": 4,
    "Final Score (out of 10): 4": "out of range",
    "Final Score (0-10): 4": "out of range",
    "Final Score: 4. Final Score: 5": "several scores",
    "Final Score: 4! Final Score: 2": "several scores",
    '{"final_score": 4, "final_score": 5}': "several scores",
    "Final Score: 4\nout of 10": "out of range",
    "Final Score: 4\n of 10": "out of range",
    "final score:4.": 4,
    "Final Score：4。": 4,  # noqa: RUF001
    "FINAL SCORE = 4": 4,
    "The sky is 3 shades off.\n\n**Final Score:** 3.62\nThat is all.": 3.62,
    "__Final Score__: **4**": 4,
    "<b>Final Score:</b> 4": 4,
    "Final Score (1-5): 4": 4,
    "Final Score:\n\\[\n\\boxed{4}\n\\]": 4,
    r"\boxed{\text{Final Score: } 4}": 4,
    "Final Score: 4\r\n- 3 details are wrong": 4,
    '{"final score": "1"}': 1,
    '{"final_score": 4, "reason": "3 of them"}': 4,
    "I have to end with Final Score: X.\nFinal Score: 4": 4,
    "Final Score: 4\nFinal Score: 4.0/5": 4,
    "Final Score: 4\nFinal Score: 2": "several scores",
    "Final Score: 4\nFinal Score: 3.5 or 4": "unclear score",
    "Final Score: 4-5\nFinal Score: 4": "unclear score",
    "Final Score: 4\n/10": "out of range",
    "Score: 4": "no score",
    "semifinal score: 4": "no score",
    "Final Score is 4": "no score",
    "4": "no score",
}
THOUGHT = """
<think>{}</think>
<THINK>{}</THINK>
<think >{}</think >
<think budget="9">{}</think>
<thinking>{}</thinking>
<reasoning>{}</reasoning>
<seed:think>{}</seed:think>
[THINK]{}[/THINK]
◁think▷{}◁/think▷
<|begin_of_thought|>{}<|end_of_thought|>
<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>
<think><think>{}</think></think>
<think>in <analysis> {}</think>
<think></think><think>{}</think>
{}</think>
""".strip().splitlines()


def cause(reply: str, pattern: re.Pattern[str] = DEFAULT) -> str:
    found = read_score(reply, pattern, 1, 5)
    assert isinstance(found, Failure), f"{reply!r} counts as {found}"
    return found.cause


@pytest.mark.parametrize("written", FOURS)
def test_what_is_clear_counts(written: str) -> None:
    for reply in (f"Final Score: {written}", f"Good.\nFinal Score: {written}\nThe end."):
        assert read_score(reply, DEFAULT, 1, 5) == 4


@pytest.mark.parametrize("written", NO_FOURS)
def test_what_is_not_one_clear_score_does_not_count(written: str) -> None:
    for reply in (f"Final Score: {written}", f"Good.\n**Final Score: {written}**\nThe end."):
        assert re.match("unclear score|no score|score out of range", cause(reply))


@pytest.mark.parametrize(("reply", "expected"), WHOLE_REPLIES.items())
def test_whole_replies(reply: str, expected: float | str) -> None:
    if isinstance(expected, str):
        assert expected in cause(reply)
    else:
        assert read_score(reply, DEFAULT, 1, 5) == expected


def test_the_range_decides_which_scale_is_meant() -> None:
    assert read_score("Final Score: 4 out of 10", DEFAULT, 0, 10) == 4
    assert read_score("Final Score: -4", DEFAULT, -5, 5) == -4
    assert str(read_score("Final Score: -0", DEFAULT, 0, 5)) == "0.0"
    failure = read_score("Final Score: 8/10", DEFAULT, 1, 5)
    assert str(failure) == "score out of range: 8/10 is not in 1..5"


@pytest.mark.parametrize("form", THOUGHT)
def test_what_the_model_thought_does_not_count(form: str) -> None:
    thought = form.format("Final Score: 2")
    assert read_score(f"{thought}\n\nFinal Score: 4", DEFAULT, 1, 5) == 4
    assert cause(thought) == "no score in the reply"
    own = re.compile(r"(?P<score>\d) stars")
    assert read_score(f"{form.format('2 stars')}4 stars", own, 1, 5) == 4


@pytest.mark.parametrize("form", [form for form in THOUGHT if not form.startswith("{}")])
def test_a_thought_that_ran_out_has_no_score(form: str) -> None:
    begun = form.partition("{}")[0]
    for pattern in (DEFAULT, re.compile(r": (?P<score>\d)")):
        assert cause(f"{begun}Final Score: 4", pattern) == "unfinished reasoning in the reply"
        assert cause(f"Final Score: 4\n{begun}", pattern) == "unfinished reasoning in the reply"


def test_other_markup_is_no_thought() -> None:
    for reply in ("[Analysis] Good.\n[Score] 4", "<answer>4</answer>", "<think/>4"):
        assert without_reasoning(reply) == reply
    assert without_reasoning("a<think>b</think>c<think>d</think>e") == "a c e"


@pytest.mark.parametrize(
    ("pattern", "reply", "expected"),
    [
        (r"<s>(?P<score>.*?)</s>", "<s> 4 </s>", 4),
        (r"(?P<score>[\d.]+)", "I say 4.", 4),
        (r"Score: (?P<score>\d+)", "Score: 4/5", 4),
        (r"(?P<score>\d)(?:/(?P<of>\w+))?", "4", 4),
        (r"(?P<score>\d)(?:/(?P<of>\w+))?", "4/5", 4),
        (r"(?P<score>\d)(?:/(?P<of>\w+))?", "4/10", "out of range"),
        (r"(?P<score>\d)(?:/(?P<of>\w+))?", "4/five", "unclear score"),
        (r"Score: (?P<score>\d+)", "Score: 4.5", "unclear score"),
        (r"Score: (?P<score>\d+)", "Score: 4,5", "unclear score"),
        (r"Score: (?P<score>\d)", "Score: 45", "unclear score"),
        (r"Score.*(?P<score>\d)", "Score: 14", "unclear score"),
        (r"Score.*(?P<score>\d)", "Score: 2.3", "unclear score"),
        (r"Score: (?P<score>[\d.]+)", "Score: 5e-1", "unclear score"),
        (r"Score: (?P<score>[\d.]+)", "Score: 4½", "unclear score"),
        (r"(?P<score>\d+)", "٤", "unclear score"),
        (r"(?P<score>\S+)", "1_0", "unclear score"),
        (r"(?P<score>.+)", "nan", "unclear score"),
        (r"(?P<score>x)?", "4", "unclear score"),
        (r"(?P<score>)", "4", "unclear score"),
    ],
)
def test_a_pattern_of_ones_own_must_hold_a_complete_number(
    pattern: str, reply: str, expected: float | str
) -> None:
    if isinstance(expected, str):
        assert expected in cause(reply, re.compile(pattern))
    else:
        assert read_score(reply, re.compile(pattern), 1, 5) == expected


@pytest.mark.parametrize(
    "part",
    [
        *(
            "final score ",
            "final score (",
            "Final Score: 4 ",
            "Final Score:",
            "<think ",
            "</think>",
        ),
        *("Final Score: <a ", "[think ", "< ", "4", ".", " ", "*", "<|channel|>", "final_"),
        f"<{' ' * 8000}",
    ],
)
def test_a_long_reply_takes_no_longer_than_it_is(part: str) -> None:
    start = time.monotonic()
    for reply in (part, "Final Score: " + part, "Final Score: 4" + part):
        read_score(reply + part * (300_000 // len(part)) + "x", DEFAULT, 1, 5)
    assert time.monotonic() - start < 5
