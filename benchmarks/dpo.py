"""DPO beside TRL's DPOTrainer: C3 (LoRA, one epoch), C4 (all weights, twice) and G5 of the design.

C3 and G5: pairs per second from the reference to the end of the last step. C4: three epochs, then again with another
beta: seconds of both runs together, and of the second run's reference stage. Our rehearsal before step 1 is counted in
C4 and told apart in the others. Tokenization is in no rate.
"""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from benchmarks.harness import Measured, by_turns, reached, told
from benchmarks.training import (
    Leg,
    TrainingBench,
    adapter_of,
    compare_rates,
    lora_config,
    model_arguments,
    our_line,
    peer_arguments,
    peer_losses,
    used_settings,
)

PEERS = ("TRL",)
BETAS = (0.1, 0.3)
NOISE = 2.0  # times as far from float32 as bf16 is anyway: still its noise


def run_trl(**given: Any) -> Measured:
    """Train with TRL's DPOTrainer."""
    import datasets
    import trl.trainer.dpo_trainer
    from peft import set_peft_model_state_dict
    from transformers import AutoTokenizer
    from transformers.trainer_callback import CallbackHandler
    from trl import DPOConfig, DPOTrainer

    leg = Leg.of(given)
    settings = peer_arguments(leg) | {"beta": leg.beta}
    if leg.peer is not None:
        settings |= {"precompute_ref_log_probs": leg.peer["precompute"]}
        settings |= {"remove_unused_columns": False}  # else its sampler does not find the lengths
        settings |= {"max_length": None}  # a limit keys its reference by beta and output folder
        settings |= {"model_init_kwargs": model_arguments(leg)}
    if leg.gate:
        _sum_in_float64(trl.trainer.utils)
    clock = leg.clock()
    clock.watch(datasets, "load_dataset", "tokenization")
    clock.watch(DPOTrainer, "_prepare_dataset", "tokenization")
    clock.watch(DPOTrainer, "_precompute_ref_logps", "reference")
    clock.watch(trl.trainer.dpo_trainer, "hash_module", "reference")
    clock.watch(CallbackHandler, "on_train_begin", "begin")
    clock.watch(CallbackHandler, "on_step_end", "step")
    rows = datasets.load_dataset("json", data_files=leg.rows, cache_dir=f"{leg.folder}/cache")
    trainer = DPOTrainer(
        leg.model,
        args=DPOConfig(**settings),
        train_dataset=rows["train"],
        processing_class=AutoTokenizer.from_pretrained(leg.model),
        peft_config=lora_config(leg),
    )
    if leg.row.lora and leg.gate:
        set_peft_model_state_dict(trainer.model, adapter_of(leg))
    trainer.train()
    return clock.measured(losses=peer_losses(trainer), settings=used_settings(trainer))


def _sum_in_float64(utils: Any) -> None:
    """Let TRL add up log-probabilities as ours does: float32 sums of several hundred differ by more than the gate."""
    head = utils._ChunkedLogProbFunction

    class Wide:
        @staticmethod
        def apply(*given: Any) -> tuple[Any, ...]:
            logps, *others = head.apply(*given)
            return logps.double(), *others

    utils._ChunkedLogProbFunction = Wide


def compare(bench: TrainingBench, pairs: int, search: bool, more: str) -> None:
    """Run a row: parity, the peer's best, then all sides by turns."""
    bench.gate(PEERS)
    if bench.name.startswith("G"):
        _check_shared_prompts(bench)
    sides = bench.sides(bench.best_peer(search, PEERS), more)
    (_two_runs if bench.row.epochs > 1 else compare_rates)(bench, sides, pairs)


def compare_shared(**given: Any) -> Measured:
    """Return how far bf16 log-probabilities of a step's pairs lie from float32's, the prompt computed once or twice."""
    import torch
    from transformers import AutoModelForCausalLM

    from fine_tune.modules.pair_logps import pair_logps
    from fine_tune.prepared_cli import prepare_as_fit

    leg = Leg.of(given)
    run = prepare_as_fit(our_line(leg)[1:])
    run.datamodule.setup("fit")
    device = torch.device(leg.row.device)
    batch = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in run.datamodule.longest_rows("train").items()
    }
    model: Any = AutoModelForCausalLM.from_pretrained(leg.model, dtype=torch.float32).to(device)
    with torch.no_grad():
        exact_B2 = pair_logps(model.eval(), batch, shared=False).weighted(1.0)  # type: ignore[arg-type]
        model = model.bfloat16()
        found = {
            name: pair_logps(model, batch, shared=shared).weighted(1.0)  # type: ignore[arg-type]
            for name, shared in (("once", True), ("twice", False))
        }
    size = exact_B2.norm()
    return {name: float((logps_B2 - exact_B2).norm() / size) for name, logps_B2 in found.items()}


def _check_shared_prompts(bench: TrainingBench) -> None:
    """End here unless a prompt computed once gives log-probabilities that bf16's noise does not tell from two's."""
    leg = Leg(bench.row, str(bench.root), str(bench.folder()), str(bench.root / "rows.jsonl"))
    apart = bench.leg("benchmarks.dpo:compare_shared", **asdict(leg))
    once, twice = apart["once"], apart["twice"]
    bench.say(
        f"log-probabilities in bf16, from float32's, relative: prompt computed once {once:.1e}, twice {twice:.1e}; "
        f"once / twice {reached(once / twice, at_most=NOISE)}"
    )
    if not once <= NOISE * twice:
        raise SystemExit("not equal, no ratio")


def _two_runs(bench: TrainingBench, sides: dict[str, dict[str, Any]], pairs: int) -> None:
    """Train, then again with another beta: seconds of both runs, and of the second one's reference."""
    totals: dict[str, list[float]] = defaultdict(list)
    references: dict[str, list[list[float]]] = defaultdict(list)
    for pair, name in by_turns(list(sides), pairs):
        folder = bench.folder()
        runs = [bench.train(folder=folder, beta=beta, **sides[name]) for beta in BETAS]
        if runs[0]["settings"] and pair == 0:
            bench.say(f"{name}: {runs[0]['settings']}")
        totals[name].append(sum(run["seconds"]["total"] for run in runs))
        references[name].append([run["seconds"].get("reference", 0.0) for run in runs])
        for beta, run in zip(BETAS, runs, strict=True):
            bench.say(f"pair {pair}, {name}, beta {beta}: {told(run)}")
    must, aim = bench.row.targets["best"]
    (peer,) = (name for name in sides if not name.startswith("ours"))
    for ours in (name for name in sides if name.startswith("ours")):
        targets = f"must: at least {must}, aim: {aim}"
        of = f"seconds of both runs, {peer} / {ours}"
        bench.ratio(of, totals[peer], totals[ours], targets)
    for name, seconds in references.items():
        if all(first for first, _ in seconds):
            firsts, seconds_again = ([run[i] for run in seconds] for i in (0, 1))
            wanted = "must: at most 0.2, aim: 0.05" if name.startswith("ours") else "no target"
            of = f"reference stage, second / first run, {name}"
            bench.ratio(of, seconds_again, firsts, wanted)
