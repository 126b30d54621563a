"""A run's settings: typed sections, TOML files, presets, command line, and errors that name the key.

A run is described by one TOML file (``--config``) plus ``section.key=value`` words on the command line.
What neither gives comes from the presets (the objective's and the fidelity's) and then from the field
defaults below. The resolved settings are saved in the run's folder and can be given back as ``--config``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from smpo_fast.config.presets import SOLVER_PRESETS
from smpo_fast.config.section import Section

EMBEDDED = "embedded"
EMBEDDED_V = "embedded-v"


class Run(Section):
    """The run's folder, length and seed."""

    dir: str = Field("runs/embedded", description="folder of the run: checkpoints, logs, export, evaluation")
    seed: int = Field(
        0, ge=0, description="seed of all random numbers, which depend only on it, their purpose, the step and the pair"
    )
    steps: int = Field(200, ge=0, description="optimizer steps in the whole run")
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    keep: int = Field(
        2, ge=1, description="number of checkpoints to keep; older ones are removed after a new one is complete"
    )
    max_nonfinite_steps: int = Field(
        10, ge=0, description="steps with a non-finite loss or gradient that are skipped before the run stops"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is a GPU, else cpu")
    speed: str = Field(
        "auto",
        description="which measured settings complete those that are given; auto: on CUDA, what smpo tune found for "
        "this GPU and network, measured at the start of a run of over an hour if nothing is stored; plain: none, and "
        "no kernels; or a file written by smpo tune, whose values replace the given ones (docs/tuning.md)",
    )


class Model(Section):
    """The networks."""

    path: str = Field(
        EMBEDDED,
        description="'embedded', 'embedded-v' (it predicts v, with zero terminal SNR), a diffusers pipeline folder, a "
        "hub id, a .safetensors checkpoint of SDXL or SD1.5 (docs/models.md), or 'sdxl' or 'sd15': the public "
        "configurations without weights, for smpo plan",
    )
    revision: str = Field("", description="hub revision (branch, tag or commit)")
    variant: str = Field("", description="file variant of the weights, e.g. 'fp16'")
    vae: str = Field("", description="VAE (folder, hub id or .safetensors file) to use instead of the pipeline's")
    unet: str = Field(
        "",
        description="UNet (folder, hub id or .safetensors file) that policy and reference start from, instead of the "
        "pipeline's",
    )
    lora: list[str] = Field(
        [],
        description="LoRA files (path, or path:scale) that are added to UNet and text encoders before anything is made "
        "of them; names as in diffusers, peft and kohya's scripts (docs/models.md)",
    )
    prediction: Literal["auto", "epsilon", "v"] = Field(
        "auto", description="what the UNet predicts; auto: as its scheduler, or the file's markers and metadata, say"
    )
    zero_terminal_snr: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="whether its noise schedule was rescaled to end without any signal; auto: as its scheduler, or the "
        "file's markers and metadata, say",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "bf16-autocast"] = Field(
        "auto",
        description="dtype in which policy and reference compute, with fp32 master weights "
        "(optim.master); "
        "'bf16-autocast' computes with fp32 weights; auto: as in the DeepSpeed file, else bf16 on cuda and fp32 on cpu",
    )
    attention: Literal["sdpa", "flash", "cudnn", "efficient", "xformers", "eager"] = Field(
        "sdpa",
        description="attention implementation; sdpa: PyTorch chooses the kernel; flash, cudnn, efficient: "
        "that kernel is preferred; "
        "what the device does not support is replaced by sdpa, with one warning",
    )
    compile: Literal["off", "inversion", "all"] = Field(
        "off",
        description="torch.compile of the transformer blocks: of the no-gradient calls of the inversion, "
        "or of the "
        "policy's and the reference's predictions as well (docs/inference.md)",
    )
    cuda_graphs: bool = Field(False, description="replay the inversion's calls as CUDA graphs, at a few batch sizes")
    merge_qkv: bool = Field(
        False,
        description="in the inversion's calls, one matrix product for a self-attention's query, key and value, from a "
        "copy of their weights",
    )
    channels_last: bool = Field(
        False,
        description="convolutions in channels-last memory layout, under DeepSpeed those of the inversion only; "
        "faster together with the kernel group_norm_silu",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute the activations of UNet blocks in the backward pass: less memory, more time"
    )
    export_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="dtype of the exported weights"
    )
    reference: Literal["auto", "replicated", "streamed", "sharded", "adapters-off"] = Field(
        "auto",
        description="where the frozen reference is kept: on every device, in host memory while no phase "
        "needs it, in "
        "shards over the ranks, or as the policy without its adapters; auto: adapters-off with LoRA, else replicated. "
        "Where inversion.store has every remaining step, or the objective needs none, it is not loaded at all",
    )


class Lora(Section):
    """Low-rank adapters, trained instead of all weights (docs/lora.md); needs the package peft."""

    rank: int = Field(0, ge=0, description="rank of the adapters; 0: no LoRA, all weights are trained")
    alpha: float = Field(
        0.0,
        ge=0,
        description="the adapters' output is scaled by alpha/rank (with use_rslora by alpha/sqrt(rank)); "
        "0: alpha = rank",
    )
    targets: list[str] = Field(
        ["attention"],
        description="layers with adapters: 'attention' (to_q, to_k, to_v, to_out.0), 'ff', 'all-linear', "
        "or ends of "
        "module names",
    )
    init: Literal["gaussian", "kaiming"] = Field(
        "gaussian", description="initial values of A (diffusers' scripts: gaussian; peft: kaiming); B starts at zero"
    )
    use_dora: bool = Field(
        False, description="DoRA: the magnitude of each weight row is trained separately from its direction"
    )
    use_rslora: bool = Field(False, description="rank-stabilised scaling by alpha/sqrt(rank)")
    merge: bool = Field(
        False, description="also write <run.dir>/merged, a pipeline with the adapters merged into its weights"
    )


class Data(Section):
    """The preference pairs."""

    pairs: str = Field(EMBEDDED, description="'embedded', a parquet file in Pick-a-Pic columns, or a folder of them")
    cache: str = Field(
        "",
        description="folder of the prepared cache, or a URL (s3://.., gs://..) that it is sent to and "
        "read from via "
        "<run.dir>/cache; empty: <run.dir>/cache",
    )
    resolution: int = Field(
        1024, ge=8, description="side length in px of the square that images are resized and centre-cropped to"
    )
    buckets: bool = Field(
        False,
        description="keep aspect ratios: crop both images of a pair to the nearest shape of about resolution^2 px",
    )
    conditioning: Literal["uncropped", "original"] = Field(
        "uncropped",
        description="SDXL's size conditioning; uncropped: as if each image had been made in the training "
        "size (the "
        "released recipe); original: its own size before resizing and the corner of the crop",
    )
    strict: bool = Field(
        False, description="stop at the first row that cannot be used; otherwise such rows are left out and counted"
    )
    only_visited: bool = Field(
        False, description="encode only the pairs that run.seed, run.steps and the labels' settings make the run visit"
    )
    flip: bool = Field(True, description="random horizontal flips, independent for winner and loser")
    prompt_dropout: float = Field(0.2, ge=0, le=1, description="share of pairs that are trained with an empty prompt")
    max_pairs: int = Field(0, ge=0, description="use only this many rows from the start of the table; 0: all")
    scores: str = Field(
        "", description="folder written by smpo score; its scores replace the rewards of the table; empty: none"
    )
    scorer: str = Field(
        "",
        description="reward model for pairs without rewards: 'embedded', 'pickscore', 'hpsv2.1', 'hpsv2', "
        "'imagereward', "
        "'aesthetic', 'clip', any with ':FOLDER_OR_HUB_ID' behind it, or 'module:function'; empty: none",
    )

    @model_validator(mode="after")
    def _rewards_of_one_place(self) -> Data:
        if self.scores and self.scorer:
            raise ValueError(f"scores = '{self.scores}' and scorer = '{self.scorer}': give one of the two")
        return self


class Labels(Section):
    """How rewards or human labels become the weight 2*alpha - gamma of a pair (docs/labels.md)."""

    source: Literal["auto", "reward", "human"] = Field(
        "auto", description="auto: a pair's rewards if it has them, else its human label"
    )
    gamma: float = Field(10.0, gt=0, description="sensitivity: weight = gamma * tanh((r_w - r_l) / (2 * temperature))")
    temperature: float = Field(
        1.0, gt=0, description="alpha/gamma = sigmoid((r_w - r_l) / temperature); the paper's formula has temperature 1"
    )
    low: float | Literal["data", "quantile", "pickscore"] = Field(
        "data",
        description="reward mapped to 0: minimum or quantile of the data, the authors' for PickScore, or a number",
    )
    high: float | Literal["data", "quantile", "pickscore"] = Field(
        "data",
        description="reward mapped to 1: maximum or quantile of the data, the authors' for PickScore, or a number",
    )
    quantile: float = Field(
        0.01, ge=0, lt=0.5, description="share of the rewards below low and above high, if these are 'quantile'"
    )
    human_weight: float = Field(
        1.0, gt=0, description="weight of a pair that has only a human label (1: as in Diffusion-DPO)"
    )
    drop_ties: bool = Field(True, description="leave out pairs that are labelled as a tie")


class Batch(Section):
    """How many pairs are processed at a time."""

    pairs_per_step: int = Field(1024, ge=1, description="pairs in one optimizer step, all ranks together")
    micro_pairs: int = Field(
        1,
        ge=1,
        description="pairs in one forward and backward pass on a rank; a step accumulates gradients over "
        "such micro-batches",
    )
    inversion_pairs: int = Field(
        4, ge=0, description="pairs in one no-gradient call of the inversion; 0: as many as inversion_gb allows"
    )
    inversion_gb: float = Field(
        8.0, ge=0.1, description="memory for that call's activations if inversion_pairs = 0, in GB (1e9 bytes)"
    )


class Inversion(Section):
    """How the noisy latent x_t and its target are computed (docs/method.md)."""

    fidelity: Literal["paper", "release"] = Field(
        "paper", description="preset for the keys below: as in the paper, or as in the released code"
    )
    source: Literal["inversion", "noise"] = Field(
        "inversion", description="x_t by inversion of x_0, or by adding Gaussian noise to it"
    )
    network: Literal["policy", "reference"] = Field("policy", description="network that computes the inversion")
    steps: int = Field(10, ge=1, le=1000, description="inversion steps over the whole schedule")
    solver: Literal["renoise", "ddim", "heun", "ab2", "pec"] = Field(
        "renoise",
        description="renoise: as the five keys from renoise_steps on say; ddim, heun: presets for them; "
        "ab2: two-step "
        "Adams-Bashforth, one call a step; pec: predict with the last estimate, correct with one call (docs/method.md)",
    )
    grid: Literal["anchored", "even", "release"] = Field(
        "anchored",
        description="anchored: t, t-D, t-2D, ... > 0; even: as many steps, of equal length; release: 1, 1+D, 1+2D, ... "
        "(D = 1000/steps)",
    )
    spacing: Literal["uniform", "sigma"] = Field(
        "uniform", description="spacing of the ceil(t/D) steps of an anchored grid: equal in t, or in sigma^(1/rho)"
    )
    rho: float = Field(3.0, gt=0, description="with spacing = 'sigma': a larger rho puts more steps at low noise")
    per_trajectory: int = Field(
        1,
        ge=1,
        description="timesteps trained per inverted pair; values above 1 are an approximation, as a "
        "pair's examples are correlated",
    )
    landing: Literal["exact", "mismatch", "on-grid"] = Field(
        "exact",
        description="how the landing timestep t is reached; exact: a shortened step; mismatch: as in the "
        "released code; on-grid: t is drawn from the grid",
    )
    first_step: Literal["skip", "keep"] = Field(
        "skip", description="whether the entry t = 1 - D at the start of the released grid is used"
    )
    renoise_steps: int = Field(1, ge=0, description="fixed-point corrections per step; 0 is DDIM inversion")
    first_time: Literal["source", "destination"] = Field(
        "source", description="timestep given to the network in the first evaluation of a step"
    )
    renoise_time: Literal["source", "destination"] = Field(
        "destination", description="timestep given to the network in the corrections"
    )
    average: Literal["mean", "last", "renoise", "angle"] = Field(
        "renoise",
        description="which noise estimate moves the latent; renoise: the mean below timestep "
        "average_below, the last one above; angle: a mean of two, weighted as if they were linear in atan(sigma)",
    )
    average_below: int = Field(250, ge=0, description="timestep below which average = 'renoise' takes the mean")
    noise: float = Field(
        0.0, ge=0, description="noise added in each step, in units of the DDIM standard deviation (InPO: 0.1)"
    )
    timesteps: Literal["stratified", "independent"] = Field(
        "stratified", description="how the timesteps of a step batch are drawn"
    )
    fp8: bool = Field(
        False,
        description="approximation: linear layers of the inversion in float8, with weights quantised "
        "again for each step",
    )
    reuse_deep: bool = Field(
        False, description="approximation: the second of two calls of a step reuses the first one's deep features"
    )
    store: str = Field(
        "",
        description="folder that keeps tau and the reference's errors for other runs on the same pairs "
        "(another beta, "
        "gamma or learning rate); needs network = 'reference' or source = 'noise'; empty: none",
    )
    schedule_dtype: Literal["float64", "float16"] = Field(
        "float64", description="rounding of alphas_cumprod; float16 only to study the released script's rounding"
    )

    @model_validator(mode="after")
    def _combinations(self) -> Inversion:
        if self.grid != "release" and self.landing != "exact":
            raise ValueError(f"landing = '{self.landing}' needs grid = 'release': other grids always land on t")
        if self.grid != "release" and self.first_step == "keep":
            raise ValueError("first_step = 'keep' needs grid = 'release': other grids have no entry below 0")
        if self.grid == "even" and self.spacing == "sigma":
            raise ValueError("spacing = 'sigma' needs grid = 'anchored': an even grid is equal in t")
        if 1000 % self.steps and self.grid == "release":
            raise ValueError(f"steps = {self.steps}: the released grid needs a divisor of 1000")
        if self.source == "noise" and self.per_trajectory > 1:
            raise ValueError("per_trajectory above 1 needs source = 'inversion'")
        if self.grid == "release" and (self.spacing == "sigma" or self.per_trajectory > 1):
            raise ValueError("spacing = 'sigma' and per_trajectory above 1 need a grid that ends on t: 'anchored'")
        if self.store and self.source == "inversion" and self.network == "policy":
            raise ValueError("store needs network = 'reference' or source = 'noise': a policy's noise changes")
        self._solver_rules()
        return self

    def _solver_rules(self) -> None:
        for key, value in SOLVER_PRESETS[self.solver].items():
            if getattr(self, key) != value and (key, self.average) != ("average", "angle"):
                raise ValueError(
                    f"solver = '{self.solver}' has {key} = {value!r}: leave the key out, or solver = 'renoise'"
                )
        if self.average == "angle" and self.renoise_steps != 1:
            raise ValueError(
                f"average = 'angle' is of two estimates, and renoise_steps = {self.renoise_steps} makes "
                f"{self.renoise_steps + 1} a step"
            )
        if self.noise and self.solver in ("ab2", "pec"):
            raise ValueError(f"noise = {self.noise}: solver = '{self.solver}' reuses estimates that noise makes stale")


class Objective(Section):
    """The loss (docs/method.md)."""

    name: Literal["smpo", "dpo", "inpo", "sft"] = Field("smpo", description="loss and preset for the inversion")
    beta: float = Field(
        5000.0, gt=0, description="strength of the regularisation towards the reference; logit = -(beta/2) w D"
    )


class Optim(Section):
    """The optimizer."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adamw8bit_aligned", "adafactor"] = Field(
        "adamw",
        description="adamw, adafactor; from bitsandbytes: adamw8bit, paged_adamw8bit (states move to the "
        "host when the "
        "GPU is full), lion8bit; adamw8bit_aligned: our own, the same result however it is sharded (docs/engine.md)",
    )
    master: Literal["fp32", "none"] = Field(
        "fp32",
        description="master weights of half-precision training; none: model.precision = 'bf16' has no "
        "other weights, "
        "and updates are rounded stochastically (adamw8bit_aligned in one process without DeepSpeed)",
    )
    accumulate: Literal["fp32", "bf16-sr"] = Field(
        "fp32",
        description="dtype in which gradients are accumulated; bf16-sr: bf16 with stochastic rounding "
        "(under the same conditions as master = 'none')",
    )
    offload: Literal["none", "states", "states+gradients"] = Field(
        "none",
        description="what adamw8bit_aligned keeps in host memory, in one process without DeepSpeed; with "
        "DeepSpeed its "
        "file says so (configs/ds_zero3_offload.json)",
    )
    lr: float = Field(
        1.024e-5, ge=0, lt=1, description="learning rate, applied as given: it is never scaled by the batch size"
    )
    warmup_steps: int = Field(100, ge=0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW and Lion")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW and Lion (Lion's authors take 0.99)")
    eps: float = Field(1e-8, gt=0, description="AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, ge=0, description="gradient norm after clipping; 0: no clipping")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of an exponential moving average of the trained weights, e.g. 0.999; 0: none",
    )
    ema_warmup: bool = Field(
        True, description="decay of the n-th step at most n / (9 + n), so that the average forgets its beginning"
    )
    ema_dtype: Literal["fp32", "bf16-sr"] = Field(
        "fp32", description="dtype of the average; bf16-sr: bf16 with stochastic rounding, half the memory"
    )


KernelName = Literal["pair_loss", "renoise_step", "group_norm_silu", "layer_norm", "geglu", "geglu_linear"]


class Kernels(Section):
    """Fused Triton kernels in place of eager code (docs/kernels.md)."""

    enabled: list[KernelName] | Literal["auto"] = Field(
        "auto",
        description="'auto': on CUDA with Triton pair_loss and renoise_step, where the run has a use for them; "
        "or exactly these: a list of pair_loss, renoise_step, group_norm_silu, layer_norm, geglu, geglu_linear; "
        "[]: none",
    )

    @property
    def listed(self) -> Sequence[KernelName]:
        """The kernels that the settings name one by one; none for 'auto'."""
        return () if self.enabled == "auto" else self.enabled


class Log(Section):
    """Where metrics are logged."""

    tensorboard: bool = Field(True, description="event files in <run.dir>/tensorboard")
    wandb: str = Field("", description="Weights & Biases project; empty: off")
    trackio: str = Field("", description="trackio project; empty: off")


ExportFormat = Literal["diffusers", "single-file", "lora-kohya", "lora-peft", "lora-diffusers"]


class Export(Section):
    """What a finished run writes beside the curves (docs/models.md); model.export_dtype is the dtype."""

    formats: list[ExportFormat] = Field(
        ["diffusers"],
        description="diffusers: <run.dir>/export, which the evaluation reads, always: a pipeline, or with adapters a "
        "LoRA; the others: also <run.dir>/<format>; single-file: a .safetensors checkpoint for ComfyUI, A1111, Forge "
        "and InvokeAI, with adapters merged; lora-kohya: a LoRA for the same programs; lora-peft, lora-diffusers: for "
        "these libraries. Without adapters a LoRA is extracted from the change of all weights",
    )
    weights: Literal["auto", "raw", "ema", "both"] = Field(
        "auto",
        description="ema: the average of the weights (optim.ema); raw: those of the last step; both: ema, and raw in "
        "<run.dir>/raw; auto: ema if there is one, else raw",
    )
    lora_rank: int = Field(64, ge=1, description="rank of an extracted LoRA, the largest where lora_energy is below 1")
    lora_energy: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each layer's squared change that an extracted LoRA keeps: a layer has the smallest rank "
        "that does, but at most lora_rank",
    )


class Eval(Section):
    """Images that are sampled and scored after training (docs/evaluation.md)."""

    prompts: str = Field("", description="'embedded', or a text file with one prompt per line; empty: no evaluation")
    count: int = Field(256, ge=1, description="number of prompts (the first ones of a file)")
    per_prompt: int = Field(1, ge=1, description="images of a prompt; two or more also measure their diversity")
    contenders: list[str] = Field(
        [],
        description="other models that are compared with the base, each a place or name=place: a run's folder, a "
        "pipeline, a UNet, a LoRA (path:scale), a single file, or a published name such as 'SmPO-SDXL' "
        "(docs/evaluation.md)",
    )
    protocol: Literal["ours", "sdpo", "linear-dpo", "dro", "lpo"] = Field(
        "ours", description="whose evaluation this is: a preset for sampler, steps, guidance, noise and seed"
    )
    sampler: Literal["pipeline", "euler", "ddim"] = Field("pipeline", description="pipeline: the pipeline's own")
    steps: int = Field(30, ge=1, description="sampler steps")
    guidance: float = Field(5.0, ge=0, description="classifier-free guidance scale; 1 is off")
    noise: Literal["index", "same", "running"] = Field(
        "index",
        description="noise of the n-th image, the same for every model: index: seed + n; same: seed, for every prompt; "
        "running: one generator for all, in their order",
    )
    seed: int = Field(12345, ge=0, description="seed of the noise")
    batch: int = Field(8, ge=1, description="images sampled at a time")
    scorer: str = Field(
        "", description="reward models that score the images, named as in data.scorer, separated by commas; empty: none"
    )
    images: str = Field(
        "",
        description="folder that keeps images and scores, for several evaluations to share; default: images/ beside "
        "the evaluation",
    )


class Config(Section):
    run: Run = Run()
    model: Model = Model()
    lora: Lora = Lora()
    data: Data = Data()
    labels: Labels = Labels()
    batch: Batch = Batch()
    inversion: Inversion = Inversion()
    objective: Objective = Objective()
    optim: Optim = Optim()
    kernels: Kernels = Kernels()
    log: Log = Log()
    export: Export = Export()
    eval: Eval = Eval()

    @property
    def drawn_per_step(self) -> int:
        """Pairs that a step draws, over all ranks: each is trained at ``inversion.per_trajectory`` timesteps."""
        return self.batch.pairs_per_step // self.inversion.per_trajectory

    @property
    def exported(self) -> tuple[str, ...]:
        """Which weights are exported, 'ema' or 'raw': the first in a run's own folder, the second in a subfolder."""
        chosen = self.export.weights
        if chosen == "auto":
            chosen = "ema" if self.optim.ema else "raw"
        return ("ema", "raw") if chosen == "both" else (chosen,)

    @model_validator(mode="after")
    def _average(self) -> Config:
        if "ema" in self.exported and not self.optim.ema:
            raise ValueError(f"export.weights = '{self.export.weights}' needs optim.ema, the decay of the average")
        return self

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        pairs, each = self.batch.pairs_per_step, self.inversion.per_trajectory
        if pairs % each:
            raise ValueError(f"batch.pairs_per_step = {pairs} is no multiple of inversion.per_trajectory = {each}")
        if "diffusers" not in self.export.formats:
            raise ValueError(
                "export.formats must have 'diffusers': the evaluation reads it, and other formats are made of it"
            )
        if "lora-kohya" in self.export.formats and self.lora.rank and self.lora.use_dora:
            raise ValueError(
                "export.formats has 'lora-kohya', but readers of kohya's names do not agree on what a DoRA is: use "
                "'lora-diffusers', 'lora-peft', or 'single-file', which has it merged"
            )
        if self.inversion.store and self.objective.name == "sft":
            raise ValueError("inversion.store keeps nothing for objective.name = 'sft', which needs no reference")
        return self
