"""What the report calls the figures that stages and gates know by name; in the order to read them."""

from collections.abc import Mapping

from train.measures import win_rate

WIN_RATES: Mapping[str, str] = {
    win_rate.LABELERS: "labelers, blind comparisons",
    win_rate.GOLD: "gold utility",
    win_rate.REWARD_MODEL: "the reward model it was trained against",
}

FIGURES: Mapping[str, str] = {
    "score": "score of the reward model",
    "gold": "gold utility",
    "kl_to_reference": "KL to the reference policy (k1), nats per completion",
    "kl_k3": "KL by k3, nats per completion",
    "eos_share": "share of completions that end",
    "completion_tokens": "tokens per completion",
    "distinct_1": "distinct tokens, share",
    "distinct_2": "distinct pairs of tokens, share",
    "pretraining_loss": "loss on pretraining text, nats per token",
    "toxicity_rate": "toxic completions of probes",
    "respectful_toxicity_rate": "toxic completions where asked to be respectful",
    "false_claim_rate": "false claims",
    "known_answer_rate": "known questions answered right",
    "best_of_sampled": "gold of several completions of a prompt",
    "best_of_chosen": "gold of the one the reward model chooses",
    "best_of_possible": "gold of the best one",
    "best_of_recovered": "share of the possible gain that choosing recovers",
    "own_accuracy": "reward model's accuracy on its own completions, by gold",
}
"""What a policy is measured on, in the order to read it, and what each number is."""

REWARD_MODEL_FIGURES: Mapping[str, str] = {
    "held_out_accuracy": "accuracy on held-out pairs",
    "held_out_accuracy_seen_labelers": "accuracy on pairs of labelers it learnt from",
    "held_out_accuracy_new_labelers": "accuracy on pairs of labelers it never saw",
    "held_out_loss": "loss on held-out pairs, nats",
    "calibration_error": "expected calibration error",
    "anchor_accuracy": "accuracy on trusted comparisons",
    "own_accuracy": "accuracy on completions of the policy it trains",
    "best_of_win_rate": "labelers prefer its choice to the others",
    "trigger_drift": "most a trigger string raises the score, SDs",
    "loss": "training loss, nats",
    "pairs": "pairs learnt from",
    "prompts": "comparisons learnt from",
}

CURVES: Mapping[str, Mapping[str, str]] = {
    "score, and gold where it is known": {"score": "score", "gold": "gold"},
    "KL to the reference, nats per completion": {"kl_to_reference": "k1", "kl_k3": "k3"},
    "entropy, nats per token": {"entropy": "entropy"},
    "explained variance of the value model": {"explained_variance": "explained variance"},
    "tokens per completion": {"completion_tokens": "tokens"},
    "share of completions that end": {"eos_share": "share"},
    "pretraining loss, nats per token": {"ptx_loss": "loss"},
    "KL coefficient": {"kl_coef": "coefficient"},
}
"""Plots over the iterations of PPO: the title, and what is drawn. Score beside gold shows over-optimisation."""

TASK_CURVES: Mapping[str, str] = {"score": "score, by task", "kl": "KL, by task, nats per completion"}
"""Plots of what ``ppo.run`` keeps for each task, as ``score[task]``."""
