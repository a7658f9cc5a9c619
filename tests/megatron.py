"""Small models of the families that Megatron-core has, and Megatron on ranks of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests import ranks

VOCABULARY = 300  # padded to 384, 512, 512 at TP 1, 2, 4
IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = {  # the traits that a family has, each somewhere
    "llama2": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 8})),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=16, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
}


def save(family: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A Hugging Face folder of a family's model, its norms and biases not the ones and zeros they start as."""
    torch.manual_seed(5)
    model = FAMILIES[family]()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(path, max_shard_size="100KB")
    (path / "tokenizer.json").write_text("{}")
    return path


class Jobs:
    """What a script of tests/peers makes of a test's cases: one job of ranks goes through those of a TP and PP.

    Args:
        peer: name of the script.
        test: the parametrised test; of its cases, those that the session runs go into the jobs.
        prepare: called with a case's parameters and an empty folder; returns the checkpoints that the script gets.
        session: of pytest.
        root: empty folder, in which each case gets one.
    """

    def __init__(
        self,
        peer: str,
        test: Callable[..., None],
        prepare: Callable[..., list[Path]],
        session: pytest.Session,
        root: Path,
    ) -> None:
        self.peer, self.prepare, self.root = peer, prepare, root
        items = [item for item in session.items if getattr(item, "function", None) is test]
        self.cases = {item.callspec.id: item.callspec.params for item in items}
        self.outcomes: dict[str, Path | Exception] = {}

    def out(self, case: str) -> Path:
        """The folder that the script wrote for a case, by the case's id.  Raises what went wrong with that case."""
        if case not in self.outcomes:
            self._run(self.cases[case]["tp"], self.cases[case]["pp"])
        outcome = self.outcomes[case]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _run(self, tp: int, pp: int) -> None:
        """All cases of a TP and PP.  One that fails ends the job; another job goes on with those after it."""
        checkpoints = {}
        for case, parameters in self.cases.items():
            if (parameters["tp"], parameters["pp"]) == (tp, pp):
                (self.root / case / "out").mkdir(parents=True)
                try:
                    checkpoints[case] = self.prepare(**parameters, folder=self.root / case)
                except Exception as error:
                    self.outcomes[case] = error
        waiting = list(checkpoints)
        while waiting:
            error = self._launch({case: checkpoints[case] for case in waiting}, tp, pp)
            done = sum((self.root / case / "out" / "done").exists() for case in waiting)
            passed = min(done, len(waiting) - 1) if error else len(waiting)  # an error after the last is the last's
            self.outcomes |= {case: self.root / case / "out" for case in waiting[:passed]}
            self.outcomes |= {case: AssertionError(error) for case in waiting[passed : passed + 1]}
            waiting = waiting[passed + 1 :]

    def _launch(self, checkpoints: dict[str, list[Path]], tp: int, pp: int) -> str:
        """One job, case after case; returns the end of its output if it failed."""
        folder = self.root / next(iter(checkpoints))
        torch.save(IDS, folder / "ids.pt")
        paths = [path for case, given in checkpoints.items() for path in (*given, self.root / case / "out")]
        command = [sys.executable, "-c", f"from tests.peers.{self.peer} import main; main()"]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port()), "OMP_NUM_THREADS": "1"}
        with (folder / "log").open("w") as log:
            job = subprocess.Popen(
                [*command, *map(str, [folder / "ids.pt", tp, pp, *paths])],
                env={**os.environ, **where},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                job.wait(240)
            except subprocess.TimeoutExpired:
                log.write("\nno end in 240 s")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGKILL)  # processes of Megatron's outlive a failure
                job.wait()
        return "" if job.returncode == 0 else f"exit code {job.returncode}\n{(folder / 'log').read_text()[-3000:]}"
