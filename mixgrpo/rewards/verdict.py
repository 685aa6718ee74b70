"""The score in a judge's reply: the number is read only where it is clear what it is."""

from __future__ import annotations

import re

from mixgrpo.rewards.completion import Failure

# What may surround a label or a number without changing it: emphasis, quotes, brackets, LaTeX's
# \boxed{} and dollars, HTML tags such as <b> and </answer> but not those that strike text out.
_MARK = r"""
    (?: [^\S\r\n] | [*_"'`“”‘’«»()\[\]{}$（）【】「」] | \\[()\[\]]
      | \\ (?: boxed | fbox | (?:math|text)(?:bf|rm|normal)? ) (?= \s* \{ )
      | < (?! /? (?: s | del | strike ) \b ) /? [a-z]\w* (?: \s [^<>\n]* )? > | <\|\w+\|> )
"""  # noqa: RUF001
_NUMBER = r"(?: [0-9]++ (?: \.[0-9]++ )?+ | \.[0-9]++ )"

# "Final Score", optionally a range in parentheses, a colon, the number, optionally "/5" or "out of
# 5". After it the line must end, or the sentence, or the member of a JSON object, or a reason must
# follow; so a range, fraction, percentage or list (4-5, 4 1/2, 80%, 4,5) is no score. Where a
# number begins that does not fit, the group is empty, and so the reply is unclear.
PATTERN = rf"""(?ix)
    (?<! [^\W_] ) final [\s_]+ score (?! [^\W_] ) (?: \s* [(\[] (?P<scale> [^()\[\]\n]* ) [)\]] )?
    (?: {_MARK} | \s )*+ [:=：＝]++ (?: {_MARK} | \s )*+
    (?= [-+−±~≈<>≤≥]{{0,2}} [^\S\r\n]? \.? \d )
    (?:
        (?P<score> [-+]? {_NUMBER} )
        (?: {_MARK}*+ \s* (?: [/／] | out \s+ of \b | of \b ) {_MARK}*+ (?P<of> {_NUMBER} ) )?+
        {_MARK}*+
        (?= [\r\n] | \Z
          | (?: , [^\S\r\n]* | (?<=\s) ) (?: because | since | due \s to ) \b
          | , \s* "[a-z_][^"\n]*" \s* :
          | [.!] {_MARK}*+ (?: (?= [\r\n] | \Z ) | (?<=\s) (?-i: [^\W\d_a-z] ) )
          | [。！]
        )
    )?+
"""  # noqa: RUF001

# Tags around a model's reasoning, such as <think>, [THINK], <|begin_of_thought|>, and the channels
# of gpt-oss.
_REASONING = re.compile(
    r"""(?ix)
    (?: [<◁] \|? | \[ (?= /? think ) ) \s{0,8} (?P<close> / | end_of_ )? \s{0,8}
    (?: begin_of_ | \w+: )?
    (?P<name> think(?:ing)? | thoughts? | reason(?:ing)? | reflection | analysis | scratchpad ) \b
    [^<>\[\]◁▷]* (?<! / ) [>▷\]]
    | <\|channel\|> \s* (?: analysis | commentary | (?P<final> final ) ) \b
    """
)
# A number as a pattern may capture it; float() also takes "nan", "1_0", "5e-1" and digits of other
# scripts.
_CAPTURED = re.compile(r"\s*(?P<number>[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*")
# The last number of a range in the label, as in "Final Score (1-5)".
_UPPER = re.compile(r"([0-9]+(?:\.[0-9]+)?)[^0-9]*\Z")
_GOES_ON = re.compile(r"[.,]?\d|e[-+]?\d|\s?[¼-¾⅐-⅞]", re.IGNORECASE)
_WENT_BEFORE = re.compile(r"\d[.,]?\Z")


def read_score(reply: str, pattern: re.Pattern[str], low: float, high: float) -> float | Failure:
    """Returns the score in a reply, or a Failure if it is missing, unclear or out of range.

    Only what is outside of the model's reasoning (``<think>...</think>``) counts. A score that is
    repeated counts once; different scores are a failure.
    """
    answer = answer_without_reasoning(reply)
    if isinstance(answer, Failure):
        return answer
    scores: set[float] = set()
    for match in pattern.finditer(answer):
        number, of = _number(match, "score"), _number(match, "of")
        if number is None or (of is None and match.groupdict().get("of") is not None):
            return Failure("unclear score in the reply")
        scale = _UPPER.search(match.groupdict().get("scale") or "")
        if scale is not None and float(scale[1]) != high:
            told = f"its label names a scale up to {scale[1]}, not to {high:g}"
            return Failure("score out of range", told)
        if not low <= number <= high or (of is not None and of != high):
            found = f"{number:g}" if of is None else f"{number:g}/{of:g}"
            return Failure("score out of range", f"{found} is not in {low:g}..{high:g}")
        scores.add(number)
        if len(scores) > 1:
            return Failure("several scores in the reply")
    return scores.pop() if scores else Failure("no score in the reply")


def answer_without_reasoning(reply: str) -> str | Failure:
    """The reply without the model's reasoning, or a Failure if the reasoning does not end."""
    answer = without_reasoning(reply)
    if answer is None:
        return Failure("unfinished reasoning in the reply", "it does not end; raise max_tokens")
    return answer


def without_reasoning(reply: str) -> str | None:
    """The reply without the model's reasoning, or None if the reasoning does not end.

    What comes before a closing tag without an opening one is reasoning as well, because many chat
    templates put the opening tag into the prompt.
    """
    kept, position = "", 0
    opened: list[str] = []
    for tag in _REASONING.finditer(reply):
        name = (tag["name"] or "channel").lower()
        if not opened:
            kept += reply[position : tag.start()] + " "
        position = tag.end()
        if not tag["close"] and not tag["final"]:
            opened.append(name)
        elif name in opened:
            del opened[opened.index(name) :]
        elif not opened:
            kept = ""
    return None if opened else kept + reply[position:]


def _number(match: re.Match[str], group: str) -> float | None:
    """The value of a group, None if it is not a complete decimal number."""
    if match.re.groupindex.get(group) is None or match[group] is None:
        return None
    captured = _CAPTURED.fullmatch(match[group])
    if captured is None:
        return None
    # Part of a number, such as the 4 of 4.5 by the pattern \d.
    text, start, end = match.string, match.start(group), match.end(group)
    if _GOES_ON.match(text, end) or _WENT_BEFORE.search(text[max(0, start - 2) : start]):
        return None
    return float(captured["number"]) + 0.0  # never -0
