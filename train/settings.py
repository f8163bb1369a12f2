"""How each stage trains: one frozen table per stage under ``[train]`` of the settings file.

Defaults are those of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155) where the paper prints them; a
description that starts with "ours" says why it differs or what the paper leaves open. They are meant for
models of a billion parameters: a model of half a million needs learning rates a hundred times larger
(``train/tinyworld/settings.toml`` holds a measured recipe).
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import SettingsConfigDict

from feedback.settings import TableSettings


class _Stage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PretrainSettings(_Stage):
    """Next-token training from random weights; the paper starts from GPT-3 (Brown et al. 2020, app. B)."""

    steps: int = Field(
        1200, gt=0, description="optimizer steps; ours: copying appears after about 800 in the tiny world"
    )
    batch_size: int = Field(32, gt=0, description="sequences per step; ours")
    sequence_length: int = Field(96, gt=1, description="tokens per packed sequence; ours")
    learning_rate: float = Field(5e-3, gt=0, description="peak; ours: measured on 0.4M parameters")
    warmup_steps: int = Field(60, ge=0, description="steps of linear warmup from a tenth of the peak; ours")
    final_lr_fraction: float = Field(0.1, ge=0, le=1, description="cosine decay ends here (GPT-3 app. B)")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's (GPT-3 app. B)")
    max_grad_norm: float = Field(1.0, gt=0, description="global norm clip (GPT-3 app. B)")


class SftSettings(_Stage):
    """Supervised fine-tuning on demonstrations (InstructGPT §C.1; as PPO's start: §C.3)."""

    epochs: int = Field(16, gt=0, description="passes over the demonstrations (§C.1); PPO's start takes 2 (§C.3)")
    batch_size: int = Field(32, gt=0, description="demonstrations per step (§C.1)")
    learning_rate: float = Field(9.65e-6, gt=0, description="peak, no warmup (§C.1, 1.3B and 6B)")
    final_lr_fraction: float = Field(0.1, ge=0, le=1, description="cosine decay ends here (§C.1)")
    dropout: float = Field(0.2, ge=0, lt=1, description="wherever the model has dropout (§C.1 has it on the residual)")
    max_grad_norm: float = Field(1.0, gt=0, description="global norm clip; ours, as GPT-3")
    pretraining_mix: float = Field(
        0.1, ge=0, description="weight of the next-token loss on pretraining text (§C.3 mixes in 10 %); 0 leaves it out"
    )
    pretraining_batch: int = Field(8, gt=0, description="packed pretraining sequences per step; ours")


class RewardModelSettings(_Stage):
    """Reward model: InstructGPT §3.5 and §C.2."""

    epochs: int = Field(1, gt=0, description="more overfit (§C.2)")
    batch_prompts: int = Field(64, gt=0, description="prompts per step, each with all its pairs (§C.2)")
    learning_rate: float = Field(9e-6, gt=0, description="peak (§C.2)")
    warmup_steps: int = Field(
        10, ge=0, description="steps of linear warmup from a tenth of the peak; ours, steadies Adam"
    )
    final_lr_fraction: float = Field(0.1, ge=0, le=1, description="cosine decay ends here (§C.2)")
    max_grad_norm: float = Field(1.0, gt=0, description="global norm clip; ours, as GPT-3")
    heads: int = Field(
        1,
        gt=0,
        le=64,
        description="scalar heads on the shared trunk, each with initial weights and a bootstrap sample of its own "
        "(Osband et al. 2016, arXiv 1602.04621); where they disagree, labelers are asked first; 1 is the paper's",
    )
    margin: float = Field(
        0.0,
        ge=0,
        description="nats by which a completion should lead another for each rank they are apart beyond the first; "
        "Llama 2 (Touvron et al. 2023, §3.2.2) has 1/3 or 1 per step of its labelers' scale; 0 is the paper's",
    )


class AlarmSettings(_Stage):
    """At what numbers a PPO run stops. Measured: nine good runs of the tiny world, 30 iterations of 256 episodes.

    Not part of what a resume point belongs to: a stopped run goes on where they were changed.
    """

    patience: int = Field(
        5, ge=0, description="iterations in a row that a number must be beyond its limit; 0: no alarms; ours"
    )
    negative_kl_errors: float = Field(
        4.0, gt=0, description="standard errors by which the mean KL of those iterations may be below 0; ours"
    )
    min_explained_variance: float = Field(
        -0.5, lt=1, description="of the value model once the policy learns; ours: measured 0.07 at worst"
    )
    min_entropy_share: float = Field(
        0.1, ge=0, lt=1, description="of the policy's first entropy; ours: measured 0.39 at worst; 0 is off"
    )
    min_eos_share: float = Field(
        0.5, ge=0, lt=1, description="of the first share of completions that end; ours: measured 0.98; 0 is off"
    )
    max_length_ratio: float = Field(
        2.0, gt=1, description="of the mean completion to the first, either way; ours: measured 0.92 to 1.33"
    )
    max_kl: float | None = Field(
        None,
        gt=0,
        description="nats per completion from the reference; None is off, because long completions take more; ours: a "
        "reward-hacked run of the tiny world passes 6 at iteration 18 of 30, sound ones stay below 1.3",
    )
    max_sampler_gap: float = Field(
        0.05,
        gt=0,
        description="nats by which sampler and trainer may differ in a token's log-probability; ours: measured 3e-5 in "
        "fp32; bf16 needs up to 1",
    )


class PpoSettings(_Stage):
    """PPO with the KL reward and pretraining mix: InstructGPT §3.5 and §C.4."""

    iterations: int = Field(500, gt=0, description="of sampling and one inner epoch (§C.4: 256k episodes in all)")
    episodes_per_iteration: int = Field(512, gt=0, description="the batch (§C.4)")
    minibatches: int = Field(8, gt=0, description="policy updates per iteration (§C.4: 64 episodes each)")
    episodes_per_forward: int = Field(
        64,
        gt=0,
        description="most episodes, or pretraining sequences, in one forward or backward pass; bounds memory. Up to "
        "it, they are divided by length so that passes and padding cost least, which changes rounding alone; ours",
    )
    policy_lr: float = Field(9e-6, gt=0, description="peak; ours: the paper does not print the released policy's")
    policy_lr_warmup_iterations: int = Field(10, ge=0, description="linear, from a tenth of the peak (§C.4)")
    policy_lr_final_fraction: float = Field(1.0, ge=0, le=1, description="cosine decay ends here (§C.4: constant)")
    value_lr: float = Field(9e-6, gt=0, description="constant (§C.4, 1.3B and 6B)")
    max_grad_norm: float = Field(1.0, gt=0, description="global norm clip, policy and value alike; ours")
    kl_coef: float = Field(0.02, ge=0, description="β of the per-token KL penalty, per nat (§C.4)")
    adaptive_kl_target: float | None = Field(
        None,
        gt=0,
        description="KL to the reference, nats per completion, that β is steered to (Ziegler et al. 2019, §2.2); "
        "None keeps kl_coef (§C.4)",
    )
    adaptive_kl_horizon: int = Field(
        10_000, gt=0, description="episodes over which β follows (lm-human-preferences, the code of Ziegler et al.)"
    )
    clip: float = Field(0.2, gt=0, description="ε of the ratio clip (§C.4)")
    value_clip: float = Field(0.2, gt=0, description="how far a value may move from its old one; ours, as §C.4's ε")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="λ; ours: the paper does not print it")
    gamma: float = Field(1.0, gt=0, le=1, description="discount (§C.4: none)")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of every log-probability since (§C.4)")
    max_completion_tokens: int = Field(1024, gt=0, description="tokens; longer completions count as unfinished (§C)")
    missing_eos_penalty: float = Field(
        2.0, ge=0, description="SDs below the reference policy's mean score that every unfinished completion gets; ours"
    )
    normalize_score: bool = Field(
        True,
        description="divide scores by their SD on samples of the reference policy; ours: makes kl_coef mean the same "
        "for every reward model (Ziegler et al. 2019, §2.1 normalise too)",
    )
    score_pessimism: float = Field(
        0.0,
        ge=0,
        description="SDs over the reward model's heads subtracted from their mean score (uncertainty-weighted "
        "optimisation, Coste et al. 2023, arXiv 2310.02743, §3, there the variance); 0: the mean alone",
    )
    importance_limit: float = Field(
        2.0,
        ge=1,
        description="a token weighs by the trainer's over the sampler's probability, at most this (truncated "
        "importance sampling, Yao et al. 2025); 1 on all tokens where the sampler is exact",
    )
    whiten_advantages: bool = Field(True, description="mean 0 and variance 1 over a batch's completion tokens; ours")
    value_only_iterations: int = Field(
        3, ge=0, description="first iterations that update the value model alone; ours: it starts worse than a constant"
    )
    target_kl: float | None = Field(
        0.1,
        gt=0,
        description="stop an iteration's policy updates once the mean KL per token from the sampling policy (k3, nats) "
        "exceeds this; ours",
    )
    ptx_coef: float = Field(27.8, ge=0, description="γ of the pretraining loss, per token (§C.4); 0 is plain PPO")
    ptx_batch: int = Field(
        512, gt=0, description="packed pretraining sequences per minibatch (§C.4: 8 times as many as episodes)"
    )
    ema: float = Field(0.992, ge=0, lt=1, description="decay per iteration of the averaged policy (§C.4); 0 is off")
    save_every: int = Field(10, gt=0, description="iterations between resume points; ours")
    alarms: AlarmSettings = Field(AlarmSettings(), description="at what numbers a run stops")
    sampler: Literal["transformers", "vllm"] = Field(
        "transformers", description="what draws the episodes; ours: vllm pays on a GPU, or for models beyond 100M"
    )
    sampler_memory_gib: float = Field(
        1.0, gt=0, description="key-value cache of the vllm sampler, GiB; ours: a million tokens of a model of 3M"
    )

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> Self:
        if self.episodes_per_iteration % self.minibatches:
            raise ValueError(f"episodes_per_iteration {self.episodes_per_iteration} must be a multiple of minibatches")
        if self.value_only_iterations >= self.iterations:
            raise ValueError("value_only_iterations must leave at least one of iterations to the policy")
        if self.adaptive_kl_target is not None and not self.kl_coef:
            raise ValueError("adaptive_kl_target needs a kl_coef above 0 to start from")
        if self.adaptive_kl_target is not None and self.adaptive_kl_horizon < self.episodes_per_iteration:
            raise ValueError(
                "adaptive_kl_horizon must be at least episodes_per_iteration, or a step may turn β negative"
            )
        return self


class DeviceSettings(_Stage):
    """What every stage computes on, and in which numbers."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: CUDA where there is one; ours. Under torchrun each process takes its own GPU"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of the forward and backward passes; weights and optimizer are fp32 always. auto: bf16 on CUDA, "
        "fp32 on a CPU, where it is exact and no slower; ours",
    )
    compile: bool = Field(False, description="torch.compile each transformer block; ours: pays after minutes of a GPU")
    checkpointing: bool = Field(
        False,
        description="keep one activation per transformer block and compute the rest again in the backward pass "
        "(Chen et al. 2016, arXiv 1604.06174): a third more time for much less memory",
    )


class LoraSettings(_Stage):
    """Low-rank adapters in place of training all weights (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(0, ge=0, description="of each adapter; 0 trains all weights, as InstructGPT does")
    alpha: int = Field(32, gt=0, description="adapters are scaled by alpha/rank; Hu et al. use 32 for GPT-2")
    target_modules: tuple[str, ...] = Field(
        (),
        description="ends of the names of the linear layers that get one; none named: all but the unembedding "
        "(Dettmers et al. 2023, arXiv 2305.14314, §4: needed to match full training)",
    )


class EvaluateSettings(_Stage):
    """What a version is measured on before it may take traffic."""

    prompts: int = Field(512, gt=0, description="held-out prompts sampled from; ours")
    temperature: float = Field(1.0, gt=0, description="of sampling, as in PPO")
    max_completion_tokens: int = Field(1024, gt=0, description="tokens, as in PPO")
    pretraining_sequences: int = Field(
        128, gt=0, description="held-out packed sequences for the pretraining loss; ours"
    )
    best_of: int = Field(8, gt=1, description="completions per prompt among which the reward model chooses; ours")
    best_of_prompts: int = Field(64, gt=0, description="held-out prompts for that, where gold can judge; ours")
    probes: str | None = Field(
        None,
        description="prompts with a known answer, for truthfulness and toxicity: tinyworld, or a JSONL file, a line "
        '{"prompt" | "messages": …, "kind": "known" | "unknown" | "toxicity" | "respectful", "answers": […], '
        '"forbidden": […]} as train/measures/probes.py describes; None: these rates are not measured',
    )
    probe_completions: int = Field(8, gt=0, description="sampled of each probe; ours")
    canary_prompts: int = Field(8, gt=0, description="prompts whose greedy completion goes into the manifest; ours")
    canary_prompt_tokens: int = Field(16, gt=0, description="greedy tokens kept of each of them; ours")


class WorkerSettings(_Stage):
    """When the worker trains, on whose comparisons, and what it does with the result."""

    min_new_comparisons: int = Field(1000, gt=0, description="new ones that start a round at once; ours")
    interval_seconds: float = Field(86_400.0, gt=0, description="a round at latest this long after the last; ours")
    poll_seconds: float = Field(10.0, gt=0, description="between looks at the log; ours")
    lease_seconds: float = Field(60.0, gt=0, description="a worker silent this long loses the lease; ours")
    max_principal_share: float = Field(
        0.005, gt=0, le=1, description="of the comparisons of a round, per principal; ours, against poisoning"
    )
    min_comparisons_for_cap: int = Field(2000, ge=0, description="below this many the share is not capped; ours")
    labeler_weights: bool = Field(
        True, description="comparisons weigh by their labeler's reliability (feedback.labelers); false: all the same"
    )
    max_prompts_per_principal: int = Field(200, gt=0, description="in the prompt set (InstructGPT §3.2)")
    distinct_prompts: bool = Field(
        True, description="each prompt once in the prompt set (§3.2); false keeps the mix in which they were asked"
    )
    shared_prefix_tokens: int = Field(
        64,
        ge=0,
        description="prompts that begin with the same tokens, at least so many and most of the longer, are one (§3.2 "
        "prints no length; ours); 0: only equal ones are",
    )
    leave_out_personal_data: bool = Field(
        True, description="prompts with e-mail addresses, telephone or account numbers are not trained on (§3.2)"
    )
    held_out_fraction: float = Field(0.1, gt=0, lt=1, description="of principals, kept for measuring (§3.2); ours")
    score_pool_prompts: int = Field(
        256, ge=0, description="prompts for labelers that each new reward model scores by how unsure it is; ours"
    )
    backoff_seconds: float = Field(
        60.0, gt=0, description="wait after a round that failed; each further failure in a row doubles it; ours"
    )
    max_backoff_seconds: float = Field(3600.0, gt=0, description="that wait is never longer; ours")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="port of the worker's Prometheus metrics; 0: none, so that workers can be many"
    )
    metrics_host: str = Field("127.0.0.1", description="address they are served on: this machine only")
    canary_fraction: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="traffic a version that passes its gate gets unasked; 0 leaves it to the operator",
    )


class TrainSettings(TableSettings):
    """The ``[train]`` table: one nested table per stage."""

    table = "train"
    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_TRAIN__")
    pretraining_text: str | None = Field(
        None,
        description="text for the pretraining mix of SFT and PPO: a file of text (a document per line), JSON lines or "
        "Parquet, a directory of such files, or tinyworld; None: there is none, and ptx_coef and pretraining_mix must "
        "be 0",
    )
    pretraining_field: str = Field("text", description="field or column of a document in JSON lines and Parquet; ours")
    device: DeviceSettings = Field(DeviceSettings(), description="what is computed on")
    lora: LoraSettings = Field(LoraSettings(), description="adapters for SFT, reward model and PPO")
    pretrain: PretrainSettings = Field(PretrainSettings(), description="next-token training")
    sft: SftSettings = Field(SftSettings(), description="supervised fine-tuning")
    reward_model: RewardModelSettings = Field(RewardModelSettings(), description="reward model training")
    ppo: PpoSettings = Field(PpoSettings(), description="policy training")
    evaluate: EvaluateSettings = Field(EvaluateSettings(), description="measuring")
    worker: WorkerSettings = Field(WorkerSettings(), description="the loop")
