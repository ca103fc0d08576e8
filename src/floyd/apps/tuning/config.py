"""What `floyd train` can be told: a file of TOML, flags of the command, keywords of `TuneConfig`; the same names."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, get_args, get_origin, get_type_hints

from floyd.errors import ConfigError

# Words of floyd.training's own, which is not imported here: it takes seconds, and help is immediate.
CROPS = ("center", "random")
POLICIES = ("error", "skip")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
PRECISIONS = ("auto", "bf16", "fp32")
PRIORS = ("noise", "network")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
METHODS = ("lora", "dreambooth", "textual-inversion", "full")
DTYPES = ("float32", "bfloat16")
# What a method wishes for, unless told otherwise.
WISHES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "lora": {},
        "dreambooth": {"steps": 400},
        "textual-inversion": {"rate": 5e-3, "weight_decay": 0.0, "caption_dropout": 0.0, "steps": 3000},
        "full": {"rate": 1e-5, "ema": 0.999},
    }
)


def _told(help_: str, default: Any = MISSING, *, one_of: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_, "one_of": one_of})


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """A run of fine-tuning. `TuneConfig.of` fills in what the method wishes for; the constructor does not."""

    # what
    model: tuple[str, ...] = _told(
        "The cascade: built-in, a folder, if-m, if-l, if-xl, or a name for each stage.", ("built-in",)
    )
    method: str = _told("lora, dreambooth, textual-inversion or full.", "lora", one_of=METHODS)
    stage: int = _told("Which stage is trained: 1 (from noise) or 2 (enlarging).", 1)
    data: str = _told("A folder of pictures, or shards: a folder of .tar files or set-{000..009}.tar.")
    out: str = _told("The folder of the run; the same run goes on where it was stopped.")
    variant: str | None = _told("Which files of the weights, as in fp16.", None)
    # data
    caption: str | None = _told("The caption of pictures that have none of their own.", None)
    clean_caption: bool = _told("Clean captions as prompts are cleaned.", True)
    caption_dropout: float = _told("Share of captions left out, which guidance lives on.", 0.1)
    on_bad: str = _told("What to do with pictures that cannot be used: error or skip.", "error", one_of=POLICIES)
    crop: str = _told("Which square of a picture: center, or random along the longer side.", "center", one_of=CROPS)
    flip: bool = _told("Mirror every other picture by lot; not if captions speak of left and right.", False)
    words: str | None = _told("A file of textual inversion: words of the captions, which it may go on with.", None)
    # lora, dreambooth
    rank: int = _told("Rank of LoRA.", 8)
    alpha: float = _told("LoRA is weighed by alpha / rank.", 8.0)
    targets: tuple[str, ...] = _told("The layers that LoRA is laid over, by the end of their names.", TARGETS)
    # dreambooth
    train_all: bool = _told("DreamBooth of all weights instead of LoRA.", False)
    class_prompt: tuple[str, ...] = _told("Of what is to be kept; pictures of it are painted by the model.", ())
    class_data: str | None = _told("Pictures with captions of what is to be kept, instead.", None)
    class_pictures: int = _told("How many are painted.", 100)
    class_dropout: float | None = _told("Share of their captions left out; caption_dropout unless told.", None)
    prior_weight: float = _told("Weight of the kept pictures' loss.", 1.0)
    prior: str = _told(
        "What they are held to: the noise in them, or what the network said of it before (LoRA alone).",
        "noise",
        one_of=PRIORS,
    )
    # textual inversion
    tokens: tuple[str, ...] = _told("The new words, which captions and prompts then contain.", ())
    start_word: str | None = _told("A word whose meaning the new ones begin with.", None)
    # loss
    snr_gamma: float = _told("Min-SNR: timesteps are weighed by min(SNR, this) / SNR.", 5.0)
    snr_floor: float = _told("... and by at least this / SNR: more weight for the noisy end.", 0.0)
    noisy_share: float = _told("Share of timesteps drawn where the layout is decided.", 0.0)
    max_noise_level: int = _told("Stage II: noise levels of the small picture are drawn below this.", 400)
    # optimization
    steps: int = _told("How many.", 1000)
    batch: int = _told("Pictures per step, over all processes and pieces.", 4)
    accumulate: int = _told("In how many pieces a batch is computed, to save memory.", 1)
    rate: float = _told("The learning rate.", 1e-4)
    last_rate: float = _told("What it falls to by the end, as a share of it.", 1.0)
    warmup: int = _told("Steps until it is reached.", 0)
    optimizer: str = _told("adamw, adamw8bit (needs bitsandbytes) or muon.", "adamw", one_of=OPTIMIZERS)
    weight_decay: float = _told("Pulls weights towards zero; of LoRA, towards no change.", 1e-2)
    max_grad_norm: float = _told("Gradients are cut to this norm.", 1.0)
    ema: float = _told("Decay of the running mean of the weights, which is what is saved; 0 is none.", 0.0)
    precision: str = _told(
        "Of the arithmetic: bf16 (autocast), fp32, or bf16 where the device has instructions for it (auto).",
        "auto",
        one_of=PRECISIONS,
    )
    dtype: str = _told("Of the weights that are not trained: float32 or bfloat16.", "float32", one_of=DTYPES)
    checkpointing: bool = _told("Compute activations twice instead of keeping them.", False)
    seed: int = _told("Decides the order of the data, the noise, and LoRA's first weights.", 0)
    device: str = _told("Where to train: auto, cpu, cuda, mps. Launched processes are told by the launcher.", "auto")
    # telling
    validate_every: int = _told("Steps between pictures of the validation prompts; 0 is never.", 0)
    validation_prompt: tuple[str, ...] = _told("What is painted then, by the whole cascade.", ())
    validation_size: int | None = _told("Side of these pictures; that of the trained stage unless told.", None)
    snapshot_every_s: float = _told("Seconds between snapshots, from which a killed run goes on.", 120.0)
    tensorboard: bool = _told("Write losses and pictures for TensorBoard into OUT/tensorboard.", False)

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _checked(each, getattr(self, each.name)))
        _check_numbers(self)
        _check_method(self)

    @classmethod
    def of(cls, **told: Any) -> Self:
        """With what the method wishes for where nothing is told."""
        _refuse_unknown(told, "")
        method = told.get("method", "lora")
        wishes = WISHES.get(method, {}) if isinstance(method, str) else {}
        if missing := [name for name in ("data", "out") if told.get(name) is None]:
            raise ConfigError(f"{' and '.join(missing)} must be told: where the pictures are, and where the run goes.")
        return cls(**{**wishes, **told})

    @classmethod
    def read(cls, path: Path | None, told: Mapping[str, Any]) -> Self:
        """From a file of TOML; what is told besides is stronger."""
        stored: dict[str, Any] = {}
        if path is not None:
            try:
                stored = tomllib.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
            stored = {name.replace("-", "_"): value for name, value in stored.items()}
            _refuse_unknown(stored, f"{path}: ")
        return cls.of(**{**stored, **told})

    def terms(self) -> dict[str, Any]:
        """What a run must be gone on with, in words of JSON; all that its weights depend on."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _FREE}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}


# May differ when a run is gone on with: its weights do not depend on them, or only in rounding.
_FREE = {"out", "device", "accumulate", "checkpointing", "validate_every", "validation_prompt", "validation_size"} | {
    "snapshot_every_s",
    "tensorboard",
}


def _refuse_unknown(told: Mapping[str, Any], place: str) -> None:
    known = [each.name for each in fields(TuneConfig)]
    for name in told:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}."
            raise ConfigError(f"{place}{name!r} is no setting of training{hint}")


def _checked(each: Field[Any], value: Any) -> Any:
    """The value if its type and word are allowed; one value for a list of them will do, and an int for a float."""
    kind = get_type_hints(TuneConfig)[each.name]
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if get_origin(kind) is tuple:
        value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
        is_right = isinstance(value, tuple) and all(isinstance(part, str) and part for part in value)
    elif bool in kinds:
        is_right = isinstance(value, bool)
    else:
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        is_right = isinstance(value, tuple(kinds)) and not isinstance(value, bool)
    if not is_right:
        word = "words" if get_origin(kind) is tuple else " or ".join(k.__name__ for k in kinds if k is not type(None))
        raise ConfigError(f"{each.name} must be {word}, got {value!r}. {each.metadata['help']}")
    if (allowed := each.metadata["one_of"]) and value not in allowed:
        near = get_close_matches(value, allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"{each.name} must be one of {', '.join(allowed)}, got {value!r}{hint}")
    return value


def _check_numbers(config: TuneConfig) -> None:
    at_least = {"rank": 1, "class_pictures": 1, "steps": 1, "batch": 1, "accumulate": 1, "warmup": 0, "seed": 0}
    at_least |= {"validate_every": 0, "max_noise_level": 1}
    for name, low in at_least.items():
        if getattr(config, name) < low:
            raise ConfigError(f"{name} must be at least {low}, got {getattr(config, name)}.")
    for name in ("caption_dropout", "class_dropout", "noisy_share", "last_rate"):
        if (share := getattr(config, name)) is not None and not 0 <= share <= 1:
            raise ConfigError(f"{name} must be in [0, 1], got {getattr(config, name)}.")
    for name in ("alpha", "rate", "max_grad_norm", "snr_gamma"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ConfigError(f"{name} must be above 0, got {getattr(config, name)}.")
    for name in ("prior_weight", "snr_floor", "weight_decay"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise ConfigError(f"{name} must be at least 0, got {getattr(config, name)}.")
    if not 0 <= config.ema < 1:
        raise ConfigError(f"ema must be in [0, 1), got {config.ema}.")
    if config.snr_floor > config.snr_gamma:
        raise ConfigError(f"snr_floor must not be above snr_gamma, got {config.snr_floor} and {config.snr_gamma}.")


def _check_method(config: TuneConfig) -> None:
    if config.stage not in (1, 2):
        raise ConfigError(f"stage must be 1 or 2, got {config.stage}; stage III is Stability's, and not trained here.")
    is_kept = bool(config.class_prompt) or config.class_data is not None
    if config.method == "dreambooth":
        if not is_kept:
            raise ConfigError(
                "dreambooth keeps what the model knows of a class: tell class_prompt, of which it paints pictures, or "
                "class_data; without either it is lora or full."
            )
        if config.class_prompt and config.class_data is not None:
            raise ConfigError("class_prompt and class_data say the same thing: tell one of them.")
        if config.prior == "network" and config.train_all:
            raise ConfigError("prior network asks the network without its LoRA, and with train_all there is none.")
        if config.batch < 2:
            raise ConfigError(f"dreambooth needs a batch of at least 2, one of each kind; got {config.batch}.")
    elif config.prior != "noise":
        raise ConfigError(f"prior is for dreambooth, and the method is {config.method}.")
    elif config.class_dropout is not None:
        raise ConfigError(f"class_dropout is for dreambooth, and the method is {config.method}.")
    elif is_kept:
        raise ConfigError(f"class_prompt and class_data are for dreambooth, and the method is {config.method}.")
    if config.method == "textual-inversion":
        if not config.tokens:
            raise ConfigError("textual-inversion needs tokens: the new words, which the captions contain.")
        if config.stage != 1:
            raise ConfigError("textual-inversion trains words with stage I; stage II then reads them, too.")
        if config.words is not None and config.start_word is not None:
            raise ConfigError("words and start_word both say what the tokens begin with: tell one of them.")
    elif config.tokens or config.start_word is not None:
        raise ConfigError(f"tokens and start_word are for textual-inversion, and the method is {config.method}.")
    if config.validate_every and not config.validation_prompt:
        raise ConfigError("validate_every needs a validation_prompt: what is to be painted.")
