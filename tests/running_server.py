"""A real server for the integration tests: two tiny random policies, an embedded Redis, vLLM on this CPU."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.registry import Registry
from deploy.versions import Draft, VersionKind
from train.evaluate import canary_prompts
from train.models import save_policy
from train.settings import EvaluateSettings

CHAT_TEMPLATE = "{% for message in messages %}> {{ message['content'] }}\n{% endfor %}>"


def build_policy(directory: Path, seed: int) -> Path:
    """A random Llama with one token a byte, as a Hugging Face directory."""
    vocabulary = {"<pad>": 0, "<eos>": 1}
    vocabulary |= {char: 2 + place for place, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.3,  # peaked enough that versions differ visibly
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    save_policy(policy, tokenizer, directory)
    return directory


def publish_policy(registry: Registry, directory: Path) -> int:
    """Publish with canary prompts, as the trainer does; returns the version."""
    prompts = [(5, 6, 7), (30, 31, 32, 33, 34)]
    canaries = canary_prompts(EvaluateSettings(), directory, prompts)
    draft = Draft(kind=VersionKind.POLICY, canary_prompts=canaries)
    return registry.publish(draft, directory).manifest.version


@dataclass
class RunningServer:
    """A server process over its own state directory."""

    url: str
    state: Path
    redis_url: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path

    def operate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``python -m deploy arguments`` against this server's release."""
        return subprocess.run(
            [sys.executable, "-m", "deploy", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def wait_ready(self, timeout_seconds: float = 240.0) -> None:
        """Wait for /ready; shows the log's tail when it does not come."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx2.get(f"{self.url}/ready", timeout=10).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.25)
        told = [line for line in self.log.read_text().splitlines() if '"serve.access"' not in line]
        pytest.fail("the server did not become ready:\n" + "\n".join(told)[-3000:])


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_server(state: Path, redis_url: str, *arguments: str, **environment: str) -> RunningServer:
    """Start ``python -m serve arguments``; does not wait."""
    port = free_port()
    env = os.environ | {"INSTRUCTLOOP_STATE": str(state), "INSTRUCTLOOP_REDIS_URL": redis_url} | environment
    log = state / "serve.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", "--port", str(port), *arguments],
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    return RunningServer(f"http://127.0.0.1:{port}", state, redis_url, env, process, log)
