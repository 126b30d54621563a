"""The arguments of every program, declared once: parser, error messages and docs/cli.md follow from these sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, field_validator, model_validator

from smpo_fast.config.schema import ExportFormat
from smpo_fast.config.section import Section

DEVICE = "where to compute; auto: cuda if there is a GPU, else cpu"
PAIRINGS = "several images of a prompt: all pairs, ends (best against worst), or once (each image in one pair)"


class Argument(NamedTuple):
    """How a field is written on the command line, where that is not ``--field-name``."""

    flag: str = ""
    metavar: str = ""
    positional: bool = False


POSITIONAL = Argument(positional=True)


JSON = Argument("--json")


def json_flag(keys: str) -> Any:
    """The field of a flag ``--json``. keys: those of the object that is printed."""
    return Field(False, description=f"print the facts as JSON: {keys}")


class NoArguments(Section):
    """No arguments of its own."""


class SettingsArguments(Section):
    """Arguments of ``smpo settings``."""

    json_output: Annotated[bool, JSON] = json_flag("settings (by section.key: default, meaning)")


class EvaluateArguments(Section):
    """Arguments of ``smpo evaluate``."""

    json_output: Annotated[bool, JSON] = json_flag(
        "out, comparisons (for each model and score: model, name, base, aligned, gain with its interval and median, "
        "win_rate with its interval, ties, p_value, p_corrected, prompts), drifts (the same for each measure)"
    )


class TrainArguments(Section):
    """Arguments of the training program."""

    ds_config: Annotated[Path | None, Argument("--ds_config", "FILE")] = Field(
        None, description="DeepSpeed JSON file: sharding, offload, precision"
    )
    print_config: bool = Field(False, description="print the resolved settings and stop")
    dry_run: bool = Field(False, description="check settings, files and pairs, say what the run would do; no networks")
    json_output: Annotated[bool, JSON] = json_flag(
        "with --dry-run: model, objective, step, optimizer, weights, run (what the run is), pairs (count, "
        "counted_in, path, unusable, unscored), labels, draws (pairs, usable, epochs), state (step, steps, "
        "checkpoint), cache, speed"
    )

    @model_validator(mode="after")
    def _json_of_a_dry_run(self) -> TrainArguments:
        if self.json_output and not self.dry_run:
            raise ValueError("--json goes with --dry-run; a run writes its facts to metrics.jsonl in its folder")
        return self


class VerifyArguments(Section):
    """Arguments of ``smpo verify``."""

    path: Annotated[Path, POSITIONAL] = Field(
        description="folder of a cache, scores, a pair table, a checkpoint, an export, stored trajectories, or a run"
    )
    deep: bool = Field(
        False, description="decode every image of a pair table; encode or score a sample again (docs/verification.md)"
    )
    json_output: Annotated[bool, JSON] = json_flag(
        "path, artifact, findings (each with grade 'ok', 'note' or 'BAD', place, text), checked, bad, notes"
    )


class ImportOptions(Section):
    """How pairs are imported; what is left empty is worked out from the source."""

    format: Literal["", "pairs", "chosen", "ranking", "single"] = Field(
        "", description="what a row of the source is (docs/data.md); default: worked out from its columns"
    )
    container: Literal["", "parquet", "arrow", "tar", "json", "csv", "w-l", "suffix"] = Field(
        "", description="how the source is stored; default: worked out from its files"
    )
    columns: Annotated[dict[str, str], Argument(metavar="MEANING=COLUMN,..")] = Field(
        {}, description="columns that are not recognised, as in prompt=text,chosen=good"
    )
    split: str = Field("", description="which split to read; default: train, if there are several")
    revision: str = Field("", description="branch, tag or commit on the hub")
    root: str = Field("", description="folder that relative paths in the source start from and may not leave")
    pairs: Literal["", "all", "ends", "once"] = Field("", description=f"{PAIRINGS}; default: once for single, else all")
    paths: bool = Field(False, description="store the paths of the images in the table, not the images")
    check: bool = Field(False, description="decode every image completely, not only its header")
    strict: bool = Field(False, description="stop at the first row that cannot be used")

    @field_validator("columns", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        columns = dict(word.partition("=")[::2] for word in value.split(",") if word)
        if not all(columns.values()):
            raise ValueError("give meaning=column, as in prompt=text,chosen=good")
        return columns


class ImportArguments(ImportOptions):
    """Arguments of ``smpo import``."""

    source: Annotated[str, POSITIONAL] = Field(
        description="a file, a folder, a URL (s3://..), or a hub id (docs/data.md)"
    )
    out: Annotated[Path, POSITIONAL] = Field(description="folder for the table; training reads it as data.pairs")
    dry_run: bool = Field(False, description="write nothing; show how the source is understood")
    json_output: Annotated[bool, JSON] = json_flag(
        "those of import.json (docs/data.md), with out; with --dry-run given, container, files, split, format, "
        "pairing, columns, records, read, pairs, rejected, rows"
    )


class ScoreOptions(Section):
    """How images are scored."""

    scorer: str = Field(
        description="a reward model (docs/data.md), or a weighted sum such as '0.7*pickscore + 0.3*aesthetic'"
    )
    batch: int = Field(32, ge=1, description="images scored at a time")
    half: bool = Field(False, description="compute in float16 if a sample computed in float32 agrees with it")
    max_pairs: int = Field(0, ge=0, description="use only the first so many rows; 0: all")


class ScoreArguments(ScoreOptions):
    """Arguments of ``smpo score``."""

    pairs: Annotated[str, POSITIONAL] = Field(
        description="a table, given as data.pairs is: a parquet file, a folder of them, or 'embedded'"
    )
    out: Annotated[Path, POSITIONAL] = Field(description="folder for the scores; training reads it as data.scores")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description=DEVICE)
    json_output: Annotated[bool, JSON] = json_flag(
        "out, counts (pairs, pictures, rejected), scorers (each with name, mean, std, weight), labels (what the scores "
        "make of the pairs)"
    )


class GenerateOptions(Section):
    """How images are generated and paired."""

    per_prompt: int = Field(4, ge=2, description="images per prompt; a pair needs two")
    count: int = Field(0, ge=0, description="use only the first so many prompts; 0: all")
    seed: int = Field(0, ge=0, description="the noise of an image depends on this seed, its prompt and its number")
    steps: int = Field(30, ge=1, description="sampler steps")
    guidance: float = Field(5.0, ge=0, allow_inf_nan=False, description="classifier-free guidance scale; 1 is off")
    negative: str = Field("", description="negative prompt")
    width: int = Field(0, ge=0, description="in px; 0: the pipeline's own")
    height: int = Field(0, ge=0, description="in px; 0: the pipeline's own")
    batch: int = Field(8, ge=1, description="images sampled at a time")
    encoding: Annotated[Literal["png", "webp"], Argument("--format")] = Field(
        "png", description="file format of the images: png, or webp (lossless; smaller, slower)"
    )
    scorer: str = Field("", description="a reward model (docs/data.md) that scores the images; empty: no scores")
    pairs: Literal["", "all", "ends", "once"] = Field(
        "", description=f"{PAIRINGS}; default: ends with a scorer, else all"
    )
    adapters: Annotated[str, Argument(metavar="FOLDER")] = Field(
        "", description="export folder of a LoRA run that started from this pipeline"
    )

    @property
    def pairing(self) -> str:
        """The pairing that is used."""
        return self.pairs or ("ends" if self.scorer else "all")

    @model_validator(mode="after")
    def _ends_are_scored(self) -> GenerateOptions:
        if self.pairs == "ends" and not self.scorer:
            raise ValueError("--pairs ends needs --scorer, which says which image is best and which is worst")
        return self


class GenerateArguments(GenerateOptions):
    """Arguments of ``smpo generate``."""

    prompts: Annotated[str, POSITIONAL] = Field(description="a text file with one prompt per line, or 'embedded'")
    out: Annotated[Path, POSITIONAL] = Field(description="folder for the table; training reads it as data.pairs")
    model: str = Field("", description="a pipeline, given as model.path is, for example a run's export folder")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description=DEVICE)


class ReportArguments(Section):
    """Arguments of ``smpo report``."""

    run: Annotated[Path, POSITIONAL] = Field(description="folder of a finished run")


class PushArguments(Section):
    """Arguments of ``smpo push``."""

    run: Annotated[Path, POSITIONAL] = Field(description="folder of a finished run")
    repository: Annotated[str, POSITIONAL] = Field(description="owner/name on the hub; it is made if there is none")
    dry_run: bool = Field(False, description="upload nothing; write the model card, and list files and sizes")
    private: bool = Field(False, description="make a new repository visible to its owner only")
    license: Annotated[str, Argument(metavar="NAME")] = Field(
        "", description="the hub's name of the license (default: the base's)"
    )
    message: str = Field("Upload with smpo-fast", description="of the commit")


class ExportArguments(Section):
    """Arguments of ``smpo export``."""

    run: Annotated[Path, POSITIONAL] = Field(description="folder of a run")
    to: Annotated[list[ExportFormat], Argument(metavar="FORMAT,..")] = Field(
        min_length=1, description=f"one or more of {', '.join(get_args(ExportFormat))} (docs/models.md)"
    )
    checkpoint: Annotated[int, Argument(metavar="STEP")] = Field(
        0, ge=0, description="step of the checkpoint (default: the newest; without any, the finished export)"
    )
    weights: Literal["", "raw", "ema", "both"] = Field(
        "", description="those of the step, their average, or both (default: the run's export.weights)"
    )
    out: Annotated[Path | None, Argument(metavar="FOLDER")] = Field(
        None, description="where to write (default: the run's folder; for an earlier step, its subfolder exports-..)"
    )
    dtype: Literal["", "float16", "bfloat16", "float32"] = Field(
        "", description="dtype of the weights (default: the run's model.export_dtype)"
    )
    rank: int = Field(0, ge=0, description="rank of an extracted LoRA (default: the run's export.lora_rank)")
    energy: float = Field(
        0.0, ge=0, le=1, description="share of the squared change that it keeps (default: the run's export.lora_energy)"
    )

    @field_validator("to", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return [word for word in value.split(",") if word] if isinstance(value, str) else value


class PlanArguments(Section):
    """Arguments of ``smpo plan``."""

    gpus: Annotated[int, Argument(metavar="N")] = Field(1, ge=1, description="number of GPUs (default 1)")
    per_node: Annotated[int, Argument(metavar="N")] = Field(8, ge=1, description="GPUs per node (default 8)")
    gpu: Annotated[str, Argument(metavar="NAME")] = Field(
        "", description="the kind of GPU, for example H100 (default: the one in this machine)"
    )
    gpu_memory: Annotated[float, Argument(metavar="GB")] = Field(
        0.0, ge=0, allow_inf_nan=False, description="memory of a GPU in units of 1e9 bytes (default: that of --gpu)"
    )
    ds_config: Annotated[Path | None, Argument("--ds_config", "FILE")] = Field(
        None, description="DeepSpeed JSON file: sharding, offload, precision"
    )
    measure: bool = Field(False, description="run one real step of each phase on this machine and report its time")
    json_output: Annotated[bool, JSON] = json_flag(
        "run, model, choice, speed, parameters, memory, phases, needed, fits, host, disk, pairs, work, time, best; in "
        "bytes, FLOP and seconds"
    )


class TuneArguments(Section):
    """Arguments of ``smpo tune``."""

    minutes: float = Field(
        5.0, gt=0, allow_inf_nan=False, description="time for measuring, not counting the loading of the networks"
    )
    memory: Annotated[float, Argument(metavar="GB")] = Field(
        0.0, ge=0, allow_inf_nan=False, description="memory that a run may use, in units of 1e9 bytes (default: all)"
    )
    approximate: Annotated[list[Literal["fp8", "reuse_deep", "pec"]], Argument(metavar="NAME,..")] = Field(
        [], description="approximations that may be chosen: fp8, reuse_deep, pec; others are only reported"
    )
    out: Annotated[Path, Argument(metavar="FILE")] = Field(
        Path("tuned.toml"), description="where to write the settings, for run.speed (default: tuned.toml)"
    )
    ds_config: Annotated[Path | None, Argument("--ds_config", "FILE")] = Field(
        None, description="DeepSpeed JSON file of the run: its sharding and precision limit what can be chosen"
    )
    json_output: Annotated[bool, JSON] = json_flag(
        "out, device, settings (the chosen ones), seconds (of their phases), candidates (settings, pair_seconds, "
        "reason if rejected), approximations (gain and error, or why not), whole_steps (ms a pair, or why not)"
    )

    @field_validator("approximate", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return [word for word in value.split(",") if word] if isinstance(value, str) else value


class DoctorArguments(Section):
    """Arguments of ``smpo doctor``."""

    ds_config: Annotated[Path | None, Argument("--ds_config", "FILE")] = Field(
        None, description="DeepSpeed JSON file whose requirements are checked as well"
    )
    json_output: Annotated[bool, JSON] = json_flag("can_train, findings (each with name, state, text, fix, needed)")


class CompletionArguments(Section):
    """Arguments of ``smpo completion``."""

    shell: Annotated[Literal["bash", "zsh", "fish"], POSITIONAL] = Field(description="bash, zsh or fish")


class Command(NamedTuple):
    """A program or subcommand: what it does, its arguments, and how a run's settings are given to it.

    group: the heading under which it is listed.  example: a command line that works on the embedded world, or on what
    the examples before it have made of a folder ``my_pictures``.  settings: 'run' takes ``--config``,
    ``section.key=value`` words and the sibling scripts' flags; 'set' takes ``--config`` and
    ``--set section.key=value``, and without ``--config`` no file at all; '' takes none.
    """

    group: str
    summary: str
    example: str
    arguments: type[Section] = NoArguments
    settings: Literal["", "run", "set"] = ""
    set_section: str = ""  # the section that --set is meant for

    @property
    def sentence(self) -> str:
        """The summary as a sentence."""
        return f"{self.summary[0].upper()}{self.summary[1:]}."


# The groups, in the order of use.
DATA, PLAN, TRAINING, JUDGE, HAND_OVER, CHECK = (
    "Prepare data", "Plan a run", "Train", "Judge the result", "Hand it over", "Check and look up",
)  # fmt: skip

TRAIN = Command(
    TRAINING,
    "align SDXL or SD1.5 with preference pairs (SmPO-Diffusion)",
    "smpo train data.pairs=pairs data.scores=scores run.dir=runs/mine run.steps=20",
    TrainArguments,
    "run",
)
COMMANDS: dict[str, Command] = {
    "import": Command(
        DATA,
        "import preference pairs of any format into one table",
        "smpo import my_pictures pairs",
        ImportArguments,
    ),
    "generate": Command(
        DATA,
        "generate images for prompts with a pipeline and pair them",
        "smpo generate embedded generated --model embedded --scorer embedded --count 8 --steps 5",
        GenerateArguments,
        "set",
        "model",
    ),
    "score": Command(
        DATA,
        "score every image of a pair table with a reward model",
        "smpo score pairs scores --scorer embedded",
        ScoreArguments,
        "set",
        "labels",
    ),
    "prepare": Command(
        DATA,
        "encode the pairs of [data] with the networks of [model] into the cache",
        "smpo prepare data.pairs=pairs data.scores=scores run.dir=runs/mine",
        NoArguments,
        "run",
    ),
    "doctor": Command(
        PLAN,
        "check this machine: what training will use, and how to repair what is missing",
        "smpo doctor",
        DoctorArguments,
    ),
    "plan": Command(
        PLAN,
        "estimate a run's memory, disk and time, and find settings that fit the GPU",
        'smpo plan --gpu "RTX 4090" run.steps=500',
        PlanArguments,
        "run",
    ),
    "tune": Command(
        PLAN,
        "measure which kernels, attention, compilation and batch sizes are fastest here",
        "smpo tune --minutes 0.5 --out tuned.toml",
        TuneArguments,
        "run",
    ),
    "train": TRAIN,
    "evaluate": Command(
        JUDGE,
        "sample a run's base and export from the same noise, score the images and compare them",
        "smpo evaluate run.dir=runs/mine",
        EvaluateArguments,
        "run",
    ),
    "report": Command(
        JUDGE,
        "write report.html again: a finished run and its evaluation on one page",
        "smpo report runs/mine",
        ReportArguments,
    ),
    "export": Command(
        HAND_OVER,
        "write a run's weights, from any of its checkpoints, in the formats of other programs",
        "smpo export runs/mine --to single-file --dtype bfloat16",
        ExportArguments,
    ),
    "merge": Command(
        HAND_OVER,
        "merge a run's LoRA adapters into the weights of its base: a pipeline in the run's folder merged/",
        "smpo merge run.dir=runs/lora lora.rank=4",
        NoArguments,
        "run",
    ),
    "push": Command(
        HAND_OVER,
        "upload a finished run's export, with a model card, to the Hugging Face hub",
        "smpo push runs/mine me/aligned --dry-run",
        PushArguments,
    ),
    "verify": Command(
        CHECK,
        "check anything that the programs write: hashes, counts, finite numbers, matching settings",
        "smpo verify runs/mine",
        VerifyArguments,
        "run",
    ),
    "settings": Command(
        CHECK,
        "print all settings with defaults and meaning, as Markdown",
        "smpo settings > settings.md",
        SettingsArguments,
    ),
    "completion": Command(
        CHECK,
        "print a script with which a shell completes commands, flags, settings and recipes",
        "smpo completion bash > smpo-completion.bash",
        CompletionArguments,
    ),
}


def by_group() -> dict[str, dict[str, Command]]:
    """The commands by their group, in the order of use."""
    groups: dict[str, dict[str, Command]] = {}
    for name, command in COMMANDS.items():
        groups.setdefault(command.group, {})[name] = command
    return groups
