import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from floyd.diffusion import timesteps
from floyd.diffusion.timesteps import TABLES, Step, checked, leading, linspace, respaced, spaced, steps_of, trailing

PUBLISHED = {
    "fast27": ("999 800 799 600 599 500 400 399 377 355 333 311 288 266 244 222 200 199 177 155 133 111 88 66 44 22 0"),
    "smart27": (
        "999 976 952 928 905 882 858 857 810 762 715 714 572 429 428 286 285 238 190 143 142 118 95 71 47 24 0"
    ),
    "smart50": (
        "999 988 977 966 955 944 933 922 911 900 899 879 859 840 820 800 799 766 733 700 699 650 600 599 500 499 "
        "400 399 350 300 299 266 233 200 199 179 159 140 120 100 99 88 77 66 55 44 33 22 11 0"
    ),
    "smart100": (
        "999 995 992 989 985 981 978 975 971 967 964 961 957 956 951 947 942 937 933 928 923 919 914 913 908 903 "
        "897 892 887 881 876 871 870 864 858 852 846 840 834 828 827 820 813 806 799 792 785 784 777 770 763 756 "
        "749 742 741 733 724 716 707 699 698 688 677 666 656 655 645 634 623 613 612 598 584 570 569 555 541 527 "
        "526 505 484 483 462 440 439 396 395 352 351 308 307 264 263 220 219 176 132 88 44 0"
    ),
    "smart185": (
        "999 997 995 992 990 988 986 984 981 979 977 975 972 970 968 966 964 961 959 957 956 954 951 949 946 944 "
        "941 939 936 934 931 929 926 924 921 919 916 914 913 910 907 905 902 899 896 893 891 888 885 882 879 877 "
        "874 871 870 867 864 861 858 855 852 849 846 843 840 837 834 831 828 827 824 821 817 814 811 808 804 801 "
        "798 795 791 788 785 784 780 777 774 770 766 763 760 756 752 749 746 742 741 737 733 730 726 722 718 714 "
        "710 707 703 699 698 694 690 685 681 677 673 669 664 660 656 655 650 646 641 636 632 627 622 618 613 612 "
        "607 602 596 591 586 580 575 570 569 563 557 551 545 539 533 527 526 519 512 505 498 491 484 483 474 466 "
        "457 449 440 439 428 418 407 396 395 381 366 352 351 330 308 307 286 264 263 242 220 219 176 175 132 131 88 "
        "44 0"
    ),
    "super27": (
        "999 991 982 974 966 958 950 941 933 925 916 908 900 899 874 850 825 800 799 700 600 500 400 300 200 100 0"
    ),
    "super40": (
        "999 992 985 978 971 964 957 949 942 935 928 921 914 907 900 899 879 859 840 820 800 799 766 733 700 699 "
        "650 600 599 500 499 400 399 300 299 200 199 100 99 0"
    ),
    "super100": (
        "999 996 992 989 985 982 979 975 972 968 965 961 958 955 951 948 944 941 938 934 931 927 924 920 917 914 "
        "910 907 903 900 899 891 884 876 869 861 853 846 838 830 823 815 808 800 799 788 777 766 755 744 733 722 "
        "711 700 699 688 677 666 655 644 633 622 611 600 599 585 571 557 542 528 514 500 499 485 471 457 442 428 "
        "414 400 399 379 359 340 320 300 299 279 259 240 220 200 199 166 133 100 99 66 33 0"
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tables_generated_from_their_strings_are_the_published_ones(name):
    published = tuple(int(t) for t in PUBLISHED[name].split())
    assert TABLES[name] == published
    assert getattr(timesteps, f"{name}_timesteps") == published
    assert respaced(name) == published


def test_there_are_eight_tables_and_the_incumbent_has_the_same():
    from diffusers.pipelines import deepfloyd_if

    assert len(TABLES) == 8
    for name, table in TABLES.items():
        assert list(table) == getattr(deepfloyd_if, f"{name}_timesteps")


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_spacing_equals_the_incumbents(spacing):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(timestep_spacing=spacing)
    for count in (1, 2, 7, 27, 48, 50, 61, 75, 96, 100, 144, 333, 1000):
        theirs.set_timesteps(count)
        table = tuple(theirs.timesteps.tolist())
        assert spaced(count, spacing=spacing) == (table[:-1] if table[-1] < 0 else table)  # theirs has one too many


def test_an_offset_shifts_the_leading_table_only():
    assert leading(3, 12, steps_offset=1) == (9, 5, 1)
    assert spaced(3, 12, spacing="trailing", steps_offset=1) == trailing(3, 12)
    assert leading(75, steps_offset=1)[:2] == (963, 950)


def test_linspace_and_trailing_start_at_the_noisiest_timestep():
    assert linspace(5)[0] == trailing(5)[0] == 999


@pytest.mark.parametrize("count", [0, -3, 1001])
def test_a_count_that_cannot_be_spaced_is_refused(count):
    for spacing in ("leading", "linspace", "trailing"):
        with pytest.raises(ValueError, match=r"in \[1, 1000\]"):
            spaced(count, spacing=spacing)


def test_an_offset_that_leaves_the_schedule_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1000\)"):
        leading(1000, steps_offset=1)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="leading, linspace, trailing"):
        spaced(10, spacing="sideways")


@pytest.mark.parametrize(
    ("sections", "length", "first", "last"),
    [
        ("150", 150, (999, 992, 986, 979), (7, 0)),
        ("100", 100, (999, 989, 979), (10, 0)),
        ("75", 75, (999, 986, 972, 958), (0,)),
        ("20,20,20,20,10,0,0,0,0,0", 90, (499,), (0,)),
        ("10,10,10,10,10,10,10,10,0,0", 80, (799,), (0,)),
        ("ddim50", 50, (980, 960), (20, 0)),
        ("ddim250", 250, (996, 992), (4, 0)),
        (" fast27 ", 27, (999,), (0,)),
    ],
)
def test_a_respacing_string_reads_as_in_the_original(sections, length, first, last):
    table = respaced(sections)
    assert len(table) == length
    assert table[: len(first)] == first
    assert table[-len(last) :] == last


@pytest.mark.parametrize("sections", ["", "10,,3", "ten", "10.5", "-3", "ddim", "ddimx", "300,900,1", "ddim700", "0,0"])
def test_a_respacing_string_that_says_nothing_is_refused(sections):
    with pytest.raises(ValueError, match=r"."):
        respaced(sections)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(any))
def test_a_respacing_visits_as_many_timesteps_of_each_section_as_it_says(counts):
    table = respaced(",".join(map(str, counts)))
    assert checked(table) == table
    size, longer = divmod(1000, len(counts))
    start = 0
    for i, count in enumerate(counts):
        stop = start + size + (i < longer)
        assert sum(start <= t < stop for t in table) == count
        start = stop


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 1000), st.floats(0.001, 1))
def test_strength_keeps_its_share_of_the_cleanest_steps(count, strength):
    table = leading(count)
    kept = int(count * strength)
    if kept == 0:
        with pytest.raises(ValueError, match="strength"):
            steps_of(table, strength)
        return
    steps = steps_of(table, strength)
    assert [s.t for s in steps] == list(table[count - kept :])
    assert [s.t_prev for s in steps] == [*table[count - kept + 1 :], -1]
    assert [s.index for s in steps] == list(range(count - kept, count))


def test_each_step_hands_over_to_the_next_and_the_last_ends_clean():
    assert steps_of((30, 20, 5)) == (Step(0, 30, 20), Step(1, 20, 5), Step(2, 5, -1))
    assert [s.is_last for s in steps_of((30, 20, 5))] == [False, False, True]


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan")])
def test_a_strength_outside_its_range_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength must be in \(0, 1\]"):
        steps_of((30, 20, 5), strength)


def test_a_strength_that_leaves_no_step_names_the_way_out():
    with pytest.raises(ValueError, match=r"at least 0\.3333, or num_inference_steps at least 4"):
        steps_of((30, 20, 5), 0.3)
    assert len(steps_of((30, 20, 10, 5), 0.3)) == 1


def test_steps_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        steps_of(())


@pytest.mark.parametrize("table", [[999, 500, 0], (3,), torch.tensor([5, 4]), torch.tensor([7, 1]).numpy()])
def test_a_custom_table_comes_back_as_plain_numbers(table):
    ours = checked(table)
    assert ours == tuple(int(t) for t in table)
    assert all(type(t) is int for t in ours)


@pytest.mark.parametrize("table", [[], [5, 5], [4, 5], [1000, 3], [3, -1]])
def test_a_custom_table_that_cannot_be_walked_is_refused(table):
    with pytest.raises(ValueError, match="timesteps must"):
        checked(table)


@pytest.mark.parametrize("table", [[5.5, 3], ["9", "3"], "fast27", [True], 7, torch.tensor([3.0])])
def test_a_custom_table_of_other_things_is_refused(table):
    with pytest.raises(TypeError, match="timesteps must be"):
        checked(table)
