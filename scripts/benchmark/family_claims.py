"""What the MixGRPO paper (arXiv 2507.21802) reports, as differences that family.py can test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """Member a's quantity minus member b's has this sign.

    Attributes:
        name: name of its comment in results/family_comments.json.
        text: the claim in the paper's terms.
        figures: the paper's figures, a then b.
        at: whether members are compared after equal "iterations" or equal "time".
        quantity: the quantity of the paper's figures.
    """

    name: str
    text: str
    figures: str
    a: str
    b: str
    sign: int = 1
    at: str = "iterations"
    quantity: str = "imagereward"

    @property
    def is_cost(self) -> bool:
        return self.quantity == "seconds_per_iteration"


def _faster(name: str, text: str, figures: str, a: str, b: str) -> Claim:
    return Claim(name, text, figures, a, b, -1, quantity="seconds_per_iteration")


CLAIMS = (
    Claim(
        name="mix_dance",
        text="MixGRPO learns more than DanceGRPO",
        figures="ImageReward 1.629, 1.436",
        a="mixgrpo",
        b="dancegrpo",
    ),
    Claim(
        name="mix_dance_time",
        text="... and still more in equal time",
        figures="half the seconds per iteration",
        a="mixgrpo",
        b="dancegrpo",
        at="time",
    ),
    _faster("dance_seconds", "an iteration of MixGRPO is shorter than DanceGRPO's",
            "150.8 s, 291.3 s", "mixgrpo", "dancegrpo"),
    Claim(
        name="shared_noise",
        text="one initial noise in a group teaches more than independent noise",
        figures="ImageReward 1.629, 1.448",
        a="mixgrpo",
        b="independent_noise",
    ),
    Claim(
        name="mix_flash",
        text="MixGRPO learns more than Flash",
        figures="ImageReward 1.629, 1.528",
        a="mixgrpo",
        b="mixgrpo_flash",
    ),
    _faster("flash_seconds", "an iteration of Flash is shorter than MixGRPO's",
            "112.4 s, 150.8 s", "mixgrpo_flash", "mixgrpo"),
    _faster("star_seconds", "an iteration of Flash* is shorter than Flash's",
            "83.3 s, 112.4 s", "mixgrpo_flash_star", "mixgrpo_flash"),
    Claim(
        name="flash_dance",
        text="Flash learns more than DanceGRPO",
        figures="ImageReward 1.528, 1.436",
        a="mixgrpo_flash",
        b="dancegrpo",
    ),
    Claim(
        name="star_dance",
        text="Flash* learns more than DanceGRPO",
        figures="ImageReward 1.624, 1.436",
        a="mixgrpo_flash_star",
        b="dancegrpo",
    ),
    Claim(
        name="cps_sde",
        text="CPS learns a little more than Flow-SDE",
        figures="ImageReward 1.645, 1.629",
        a="mixgrpo_cps",
        b="mixgrpo",
    ),
    Claim(
        name="window_1",
        text="a window of 4 is better than one of 1",
        figures="HPS-v2.1 .367, .359",
        a="mixgrpo",
        b="window_1",
        quantity="hpsv2",
    ),
    Claim(
        name="window_2",
        text="a window of 4 is better than one of 2",
        figures="HPS-v2.1 .367, .362",
        a="mixgrpo",
        b="window_2",
        quantity="hpsv2",
    ),
    Claim(
        name="window_6",
        text="a window of 6 is better than one of 4",
        figures="HPS-v2.1 .370, .367",
        a="window_6",
        b="mixgrpo",
        quantity="hpsv2",
    ),
    Claim(
        name="pace",
        text="25 iterations per window (there 12 windows of 21, here 3 of 6) are better than 15",
        figures="ImageReward 1.629, 1.509",
        a="windows_3",
        b="free_progressive",
    ),
    Claim(
        name="random",
        text="windows that move on are better than random ones",
        figures="order of the paper's table",
        a="free_progressive",
        b="free_random",
    ),
    Claim(
        name="exp_decay",
        text="equally long windows are better than ever shorter ones (exp_decay)",
        figures="order of the paper's table",
        a="free_progressive",
        b="free_exp_decay",
    ),
    Claim(
        name="decay",
        text="equally long windows are better than linearly shorter ones (decay)",
        figures="order of the paper's table",
        a="free_progressive",
        b="free_decay",
    ),
    Claim(
        name="frozen",
        text="windows that move on are better than a frozen one",
        figures="order of the paper's table",
        a="free_progressive",
        b="free_frozen",
    ),
    Claim(
        name="prefix",
        text="DPM-Solver++ before the window harms",
        figures="ImageReward 1.528, 1.235",
        a="late",
        b="fast_prefix",
    ),
)  # fmt: skip
