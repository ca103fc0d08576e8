"""What a plan promises: it fits, it is the fastest of those that fit, and more memory is never slower."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest

from floyd.runtime.budget import Budget
from floyd.runtime.choices import CARD_PROCESS_BYTES
from floyd.runtime.machine import ANY_CARD, Machine
from floyd.runtime.parts import Part, Precision, Way, Weight, bytes_of
from floyd.runtime.places import CARD_WORKSPACE
from floyd.runtime.plan import Plan, plan

HALF, PACKED, TINY = Precision("bfloat16"), Precision("bfloat16", "int8"), Precision("bfloat16", "int4")
CPU = Machine(name="a CPU", flops=1e11, memory_bytes=3e10, link_bytes=0)


def network(name: str, num_layers: int, *, passes: int = 1, rows: int = 1, layer: int = 4096) -> Part:
    """Layers of 33 MB in bfloat16."""
    weights = tuple(Weight(f"layer{i}", (layer, layer)) for i in range(num_layers))
    flops, numbers = 2e9 * num_layers * rows, 5e7
    ways = tuple(Way(rows // at_once, flops, numbers * at_once, at_once) for at_once in (rows, 1) if at_once <= rows)
    return Part(name, weights, (HALF, PACKED, TINY), passes, ways, stored_bytes=num_layers * layer**2 * 2)


PARTS = [
    network("stage_1.text_encoder", 60),
    network("stage_1.unet", 40, passes=50, rows=2),
    network("stage_2.unet", 20, passes=30, rows=2),
]


def made(vram: str | int, ram: str = "64GB", machine: Machine = ANY_CARD, parts: list[Part] | None = None) -> Plan:
    return plan(PARTS if parts is None else parts, Budget(vram=vram, ram=ram), machine)


def fits(vram: int, ram: str) -> bool:
    try:
        made(vram, ram)
    except ValueError as error:
        if "the smallest that works is" not in str(error):
            raise
        return False
    return True


def test_a_weight_is_as_large_as_its_precision_says() -> None:
    assert bytes_of((100, 64), "float32") == 25600
    assert bytes_of((100, 64), "bfloat16") == 12800
    assert bytes_of((100, 64), "bfloat16", "int8") == 6400 + 400
    assert bytes_of((100, 64), "bfloat16", "int4") == 3200 + 400
    assert bytes_of((100,), "bfloat16", "int8") == 200
    assert Weight("wo", (10, 10), overflows=True).num_bytes(Precision("float16")) == 400


def test_where_everything_fits_everything_stays_whole() -> None:
    plan = made("80GB")
    assert [choice.place for choice in plan.choices] == ["card"] * 3
    assert {choice.precision for choice in plan.choices} == {HALF}
    assert plan.vram_peak <= sum(part.num_bytes(HALF) for part in PARTS) + 2 * 10**8 + CARD_WORKSPACE


@pytest.mark.parametrize("ram", ["64GB", "5GB", "3.5GB"])
def test_more_memory_is_never_slower_and_never_exceeded(ram: str) -> None:
    sizes = [int(0.3e9 * 1.15**i) for i in range(41)]  # to 80 GB
    plans = []
    for size in sizes:
        if not fits(size, ram):
            assert not plans, "a larger budget than one that works"
            continue
        plans.append(made(size, ram))
        assert plans[-1].vram_peak <= size
        assert plans[-1].ram_peak <= Budget(ram=ram).ram_bytes
    assert len(plans) > 20
    assert all(more.seconds <= less.seconds for less, more in pairwise(plans))


def test_more_main_memory_is_never_slower() -> None:
    plans = [made("2GB", f"{tenths / 10}GB") for tenths in range(26, 90, 4)]
    assert all(more.seconds <= less.seconds for less, more in pairwise(plans))
    assert not all(choice.is_kept for choice in plans[0].choices)
    assert all(choice.is_kept for choice in plans[-1].choices)


def test_what_is_too_small_is_told_with_the_smallest_that_works() -> None:
    with pytest.raises(ValueError, match=r"0.2 GB of VRAM is too little for this: the smallest that works is 0.4 GB"):
        made("0.2GB")
    assert made("0.4GB")
    with pytest.raises(
        ValueError, match=r"of RAM is too little for this: the smallest that works is (\S+) GB"
    ) as raised:
        made("8GB", "1.6GB")
    smallest = str(raised.value).split()[-2]
    assert made("8GB", f"{smallest}GB")


def test_no_other_arrangement_that_fits_is_faster() -> None:
    """By trying them all for two networks: stay or come, whole or packed."""
    parts = PARTS[1:]
    budget, best = 3_000_000_000, made("3GB", parts=parts)
    link, times = ANY_CARD.link_bytes, []
    for precisions in product([HALF, PACKED], repeat=2):
        for stays in product([True, False], repeat=2):
            sizes = [part.num_bytes(p) for part, p in zip(parts, precisions, strict=True)]
            resident = sum(size for size, stay in zip(sizes, stays, strict=True) if stay)
            unpacked = [part.unpacked_bytes(p) for part, p in zip(parts, precisions, strict=True)]
            peaks = [
                resident + (0 if stay else size) + 2 * 10**8 + CARD_WORKSPACE + more
                for size, stay, more in zip(sizes, stays, unpacked, strict=True)
            ]
            if max(peaks) <= budget:
                times.append(sum(0 if stay else size / link for size, stay in zip(sizes, stays, strict=True)))
    assert times
    computing = sum(choice.seconds for choice in made("80GB", parts=parts).choices)
    assert best.seconds <= computing + 1.1 * max(times) + 1e-9


def test_a_network_that_is_called_often_stays_before_one_that_is_called_once() -> None:
    choices = made("2.5GB").choices
    assert choices[1].streamed_bytes <= choices[1].num_bytes // 2
    assert choices[0].place != "card"


def test_packing_can_be_forbidden_and_four_bits_are_the_last_resort() -> None:
    exact = plan(PARTS, Budget(vram="1GB", ram="64GB", quantize=False), ANY_CARD)
    assert {choice.precision for choice in exact.choices} == {HALF}
    assert TINY not in {choice.precision for choice in made("0.5GB").choices}
    tight = made("1GB", f"{(CARD_PROCESS_BYTES + 700_000_000) / 1e9}GB")
    assert tight["stage_1.text_encoder"].precision == TINY


def test_tiles_are_for_where_the_whole_does_not_fit() -> None:
    ways = (Way(1, 1e12, 8e8, 1), Way(9, 1.5e12, 1e8, 1, tile=64))
    part = replace(network("vae", 2), ways=ways, precisions=(HALF,))
    assert made("8GB", parts=[part])["vae"].way.tile is None
    assert made("1GB", parts=[part])["vae"].way.tile == 64


def test_a_batch_is_cut_before_its_network_is_carried_too_often() -> None:
    assert made("80GB")["stage_1.unet"].way.rows == 2
    part = replace(PARTS[1], ways=(Way(1, 1e10, 2e9, 2), Way(2, 1e10, 1e9, 1)))
    assert made("4GB", parts=[part])["stage_1.unet"].way.rows == 1


def test_weights_are_laid_out_anew_only_where_there_is_room_for_it() -> None:
    part = replace(PARTS[1], precisions=(HALF,), weights=tuple(w._replace(copies=0.5) for w in PARTS[1].weights))
    own = part.copied_bytes(HALF)
    assert own == part.num_bytes(HALF) // 2
    assert part.copied_bytes(PACKED) == 0
    without = made("80GB", parts=[PARTS[1]])["stage_1.unet"].peak_bytes
    for vram, copied in ((without + own, own), (without + own - 1, 0)):
        plan = made(vram, parts=[part])
        choice = plan["stage_1.unet"]
        assert (choice.place, choice.copied_bytes, choice.copies) == ("card", copied, copied > 0)
        assert plan.vram_peak == choice.peak_bytes == without + copied
    least = plan_on_cpu(part, "64GB").ram_peak - own
    assert plan_on_cpu(part, least + own).ram_peak == least + own
    assert plan_on_cpu(part, least + own - 1).ram_peak == least
    assert plan_on_cpu(part, least + own).busy_bytes("stage_1.unet") > own


def plan_on_cpu(part: Part, ram: str | int) -> Plan:
    return plan([part], Budget(vram=0, ram=ram), CPU)


def test_a_later_call_with_more_pictures_is_cut_where_the_budget_ends() -> None:
    choice = made("6GB", parts=PARTS[1:2])["stage_1.unet"]
    peak = choice.peak_bytes + (choice.max_rows - 2) * 10**8
    assert choice.max_rows > 2
    assert peak <= 6 * 10**9 < peak + 10**8


def test_without_a_card_everything_is_in_main_memory_or_read_when_needed() -> None:
    parts = [replace(part, precisions=(Precision("float32"), HALF, Precision("float32", "int8"))) for part in PARTS]
    roomy = plan(parts, Budget(vram=0, ram="64GB"), CPU)
    assert {choice.place for choice in roomy.choices} == {"cpu"}
    assert {choice.precision.dtype for choice in roomy.choices} == {"float32"}
    assert roomy.vram_peaks == ()
    tight = plan(parts, Budget(vram=0, ram="4.5GB"), CPU)
    assert tight.ram_peak <= 4.5e9
    assert not all(choice.is_kept and choice.precision == Precision("float32") for choice in tight.choices)


def test_two_cards_share_the_stages() -> None:
    one = made("2.4GB")
    two = plan(PARTS, Budget(vram=("2.4GB", "2.4GB"), ram="64GB"), ANY_CARD)
    assert two.seconds < one.seconds
    assert {choice.card for choice in two.choices} == {0, 1}
    assert all(peak <= 2.4e9 for peak in two.vram_peaks)
    assert len({choice.card for choice in two.choices if choice.part == "stage_1.unet"}) == 1
    unequal = plan(PARTS, Budget(vram=("0.6GB", "8GB"), ram="64GB"), ANY_CARD)
    assert unequal["stage_1.unet"].card == 1


def test_a_plan_tells_all_of_itself_as_json() -> None:
    told = made("2GB").to_json()
    assert [row["component"] for row in told["components"]] == [part.name for part in PARTS]
    assert told["vram_peak_bytes"] == [made("2GB").vram_peak]
    assert all(row["why"] for row in told["components"])
