"""Every Python block of the README and the docs runs, in order, a page at a time, and what their tables say holds.

Hub ids mean the tiny checkpoints of `tests/hub_cache.py`. There is no network; the addresses of pictures, bitsandbytes
and a compiler have stand-ins, and many steps a few.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import standins
from tests.hub_cache import IDS

import floyd
from floyd.models.unet import UNet2DConditionModel
from floyd.pipelines.base import DiffusionPipeline
from floyd.runtime.machine import computes_in

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("**/*.md")])
BLOCK = re.compile(r"^```(?:python|py)[ \t]*(?P<flags>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
PIPELINES = [
    floyd.IFPipeline,
    floyd.IFSuperResolutionPipeline,
    floyd.IFImg2ImgPipeline,
    floyd.IFImg2ImgSuperResolutionPipeline,
    floyd.IFInpaintingPipeline,
    floyd.IFInpaintingSuperResolutionPipeline,
    floyd.StableDiffusionUpscalePipeline,
]


def runnable(code: str) -> str:
    """In float32 what this processor would take minutes to emulate."""
    for half in (torch.float16, torch.bfloat16):
        if not computes_in(half, torch.device("cpu")):
            code = code.replace(str(half), "torch.float32")
    return code


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The line above each block, and its code."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start("code")), match["code"]


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standins.take_fewer_steps(monkeypatch)
    standins.serve_pictures(monkeypatch)
    standins.quantize_without_bitsandbytes(monkeypatch)
    standins.compile_without_a_compiler(monkeypatch)
    standins.lay_out_a_single_t5(published, tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for line, code in blocks(page):
        exec(compile("\n" * line + runnable(code), str(page), "exec"), namespace)  # tracebacks show the page's own line


def test_no_block_is_left_out() -> None:
    """A fence that the pattern misses would never run."""
    for page in PAGES:
        text = page.read_text()
        assert len(re.findall(r"^\s*```\s*(?:python|py)\b", text, re.MULTILINE)) == len(list(blocks(page))), page.name
        assert not any(match["flags"] for match in BLOCK.finditer(text)), f"{page.name}: no block is excused"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            goal = page.parent / target if target else page
            assert goal.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in _anchors(goal), f"{page.name} links to {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", (DOCS / "index.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    assert "docs/index.md" in (ROOT / "README.md").read_text()


def test_every_checkpoint_of_the_docs_is_one_that_the_tests_build() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"(?:DeepFloyd|stabilityai)/[\w.-]*\w(?![-\w{])", text)) == set(IDS)


def _rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table whose head begins with `head`."""
    lines = iter((DOCS / page).read_text().splitlines())
    for line in lines:
        if line.startswith(head):
            next(lines)
            rows = []
            while (row := next(lines, "")).startswith("|"):
                rows.append([cell.strip() for cell in row.strip("|").split("|")])
            return rows
    raise AssertionError(f"{page} has no table {head}")


def test_the_table_of_defaults_is_what_the_calls_have() -> None:
    names = ["num_inference_steps", "guidance_scale", "strength", "noise_level"]
    rows = _rows(
        "pipelines.md", "| default of | `num_inference_steps` | `guidance_scale` | `strength` | `noise_level` |"
    )
    told = {row[0].strip("`"): row[1:] for row in rows}
    have = {}
    for kind in PIPELINES:
        parameters = inspect.signature(kind.__call__).parameters
        have[kind.__name__] = [str(parameters[name].default) if name in parameters else "–" for name in names]
    assert told == have


def test_the_table_of_arguments_names_all_there_are() -> None:
    told = {name for row in _rows("pipelines.md", "| argument | meaning |") for name in re.findall(r"`(\w+)`", row[0])}
    have = {name for kind in PIPELINES for name in inspect.signature(kind.__call__).parameters} - {"self"}
    assert told == have


def test_the_table_of_loading_names_every_argument() -> None:
    rows = _rows("pipelines.md", "| argument of `from_pretrained` | meaning |")
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    signature = inspect.signature(DiffusionPipeline.from_pretrained).parameters
    have = set(signature) - {"pretrained_model_name_or_path", "components"} | {"requires_safety_checker"}
    assert told == have


def test_the_table_of_tasks_is_what_the_auto_classes_make() -> None:
    for auto, one, two in _rows("converting.md", "| | from a stage I | from a stage II |"):
        kind: Any = getattr(floyd, auto.strip("`"))
        assert (kind.stage_one.__name__, kind.stage_two.__name__) == (one.strip("`"), two.strip("`"))


def test_the_table_of_settings_names_every_one_with_its_default() -> None:
    from dataclasses import MISSING, fields

    from floyd.apps.tuning.config import WISHES, TuneConfig

    def word(default: Any) -> str:
        if default is MISSING:
            return "needed"
        if default in (None, ()):
            return "none"
        if isinstance(default, tuple):
            return " ".join(default)
        return {True: "yes", False: "no"}[default] if isinstance(default, bool) else f"{default}"

    have = {}
    for each in fields(TuneConfig):
        wishes = [f"{method} {wish[each.name]:g}" for method, wish in WISHES.items() if each.name in wish]
        default = f"{each.default:g}" if type(each.default) in (int, float) else word(each.default)
        have[each.name] = [default + (f" ({', '.join(wishes)})" if wishes else ""), each.metadata["help"]]
    assert {row[0].strip("`"): row[1:] for row in _rows("training.md", "| setting | default | |")} == have


def test_the_tables_of_timesteps_are_all_named() -> None:
    from floyd.diffusion.timesteps import TABLES

    rows = _rows("speed.md", "| stage | tables |")
    assert {name for _, names in rows for name in re.findall(r"`(\w+)`", names)} == set(TABLES)


def test_the_table_of_trainings_memory_is_counted_from_the_networks() -> None:
    """Bytes of each weight: 2 where it is frozen in bfloat16; 16 with its gradient and AdamW's moments, 10 with theirs
    of a byte each; 4 for its running mean."""
    from floyd.adapters.factors import layer_shapes
    from floyd.models.configs import PRESETS
    from floyd.training.lora import TARGETS

    width, inner, layers, vocabulary = 4096, 10240, 24, 32128  # T5 v1.1 XXL, 64 heads of 64
    t5 = vocabulary * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + 32 * 64 + width
    have = {"T5, before anything is trained": [_billions(t5), *[_gigabytes(2 * t5)] * 3, ""]}
    for name in ("IF-I-XL", "IF-I-L", "IF-I-M", "IF-II-L", "IF-II-M"):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**PRESETS[name])
        count = sum(p.numel() for p in unet.parameters())
        shapes = [shape for path, shape in layer_shapes(unet) if path.endswith(TARGETS)]
        lora = sum(8 * (shape.inputs + shape.outputs) for shape in shapes)
        have[name] = [_billions(count), *map(_gigabytes, (2 * count + 16 * lora, 16 * count, 10 * count, 4 * count))]
    rows = _rows("training.md", "| | parameters | LoRA, rank 8, bfloat16 |")
    assert {row[0]: row[1:] for row in rows} == have


def _billions(count: int) -> str:
    return f"{count / 1e9:.{1 if count > 2e9 else 2}f} B"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}"
