"""shardlm: write a Transformer once, lay it out over any devices, get the single device's numbers."""

from shardlm import data, inspect
from shardlm._version import __version__
from shardlm.checkpoint import CheckpointWarning, DamagedCheckpoint, SaveError, read_metadata, restore, save
from shardlm.generate import score
from shardlm.generate.api import generate
from shardlm.generate.result import Completion, Generation, Piece
from shardlm.hub import load_hf, load_lora, load_tokenizer, save_hf, save_lora
from shardlm.inspect import Report
from shardlm.layout import Axis, Layout, LayoutError, Pipeline
from shardlm.models import presets
from shardlm.models.config import (
    MLP,
    Attention,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    Lora,
    Norm,
    Rope,
    TransformerConfig,
)
from shardlm.models.lora import adapters, add_lora, merge_lora
from shardlm.models.transformer import Transformer
from shardlm.rules import ReplicatedParameterWarning, match_rules
from shardlm.runtime import fake_devices, initialize
from shardlm.runtime.preemption import Preempted
from shardlm.train.fit import NonFiniteLoss
from shardlm.train.optimizer import adamw, decayed, matrix_dims, muon
from shardlm.train.sample import sample
from shardlm.train.state import TrainState
from shardlm.train.trainer import Trainer
from shardlm.verification import Verification, VerificationError, verify

__all__ = [
    "MLP",
    "Attention",
    "Axis",
    "CheckpointWarning",
    "DamagedCheckpoint",
    "Completion",
    "Generation",
    "Layout",
    "LayoutError",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "Lora",
    "NonFiniteLoss",
    "Norm",
    "Piece",
    "Pipeline",
    "Preempted",
    "Report",
    "ReplicatedParameterWarning",
    "Rope",
    "SaveError",
    "TrainState",
    "Trainer",
    "Transformer",
    "TransformerConfig",
    "Verification",
    "VerificationError",
    "__version__",
    "adamw",
    "adapters",
    "add_lora",
    "data",
    "decayed",
    "fake_devices",
    "generate",
    "initialize",
    "inspect",
    "load_hf",
    "load_lora",
    "load_tokenizer",
    "match_rules",
    "matrix_dims",
    "merge_lora",
    "muon",
    "presets",
    "read_metadata",
    "restore",
    "sample",
    "save",
    "save_hf",
    "save_lora",
    "score",
    "verify",
]
