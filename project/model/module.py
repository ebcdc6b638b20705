"""Defines the LightningModule: a backbone with exit heads at several depths, its loss, adapters and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import polars
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig

from project.data.batch import Batch
from project.data.download import resolve_model
from project.datamodule import InteractionData, check_reads, reads_of
from project.errors import CheckpointError, ConfigError, NotFittedError
from project.evaluation.result import (
    ScoreCollector,
    choose_exit,
    exit_rows,
    scores_of,
)
from project.features import FEATURES, FeatureBaseline, Term
from project.model.backbone import Backbone, usable_config
from project.model.heads import ExitHead, answer_tokens
from project.model.initial import check_origin, copy_weights, read_initial, read_until
from project.model.optim import (
    OptimSettings,
    cosine_with_warmup,
    parameter_groups,
    planned_steps,
)
from project.model.sharding import WHOLE, shared_mesh
from project.run import Checkpoint, read_checkpoint

LORA_SCALE = 2  # an adapter's output is multiplied by it


@dataclass
class LoraSettings:
    """Low-rank adapters (Hu et al., LoRA, 2021) that are trained instead of the backbone's own weights.

    Args:
        rank: Rank of the adapters.
    """

    rank: int = 16


def add_lora(backbone: Backbone, settings: LoraSettings) -> None:
    """Put adapters on all of the backbone's linear layers, in place, and freeze everything else in it.

    At first an adapter adds nothing: one of its two factors starts at zero.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=LORA_SCALE * settings.rank,  # peft divides it by r
        # every linear layer of attention and MLP, such as layers.0.self_attn.q_proj
        target_modules=[
            f"layers.{name}"
            for name, part in backbone.layers.named_modules()
            if isinstance(part, nn.Linear)
        ],
    )
    inject_adapter_in_model(config, backbone)  # freezes all that is no adapter


def frozen_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are not trained: what a checkpoint leaves to the base model."""
    return {
        name for name, parameter in module.named_parameters() if not parameter.requires_grad
    }


DEFAULT_OPTIM = OptimSettings()
DEFAULT_EXITS = [2, 4, 6]


class ExitRecommender(L.LightningModule):
    """A decoder-only LLM cut at exit layers, each with a head that predicts the answer.

    Args:
        backbone: A known model (smollm2-135m-instruct), a folder with a Hugging Face model, or a name on its hub.
            Families: Llama/SmolLM2, SmolLM3, Qwen2, Qwen3, Mistral without a sliding window.
        exit_layers: Depths that have a head, ascending; layer k means after k decoder layers. The last one is the full
            depth: later layers of the backbone are not loaded.
        optim: Learning rates.
        lora: Train adapters instead of the backbone's own weights.
        freeze_embeddings: Keep the token embeddings as they are.
        head: Class of the prediction heads, by its path: project.model.heads.ExitHead or a subclass.
        initial: Folder of a run whose weights `fit` starts from; its train rows must lie before all that are scored.
            trusted:FOLDER where you know that, and times cannot tell.
        answers: Texts of the answers dislike and like; set by data.prompt.answers.
        numbers: Learn tokens for numbers in prompts; set by data.prompt.segment.
        items: Learn tokens for items' texts in prompts; set by data.prompt.segment.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m-instruct",
        exit_layers: list[int] = DEFAULT_EXITS,
        optim: OptimSettings = DEFAULT_OPTIM,
        lora: LoraSettings | None = None,
        freeze_embeddings: bool = True,
        head: type[ExitHead] = ExitHead,
        initial: str | None = None,
        answers: list[str] | None = None,
        numbers: bool = False,
        items: bool = False,
    ) -> None:
        super().__init__()
        # 1. settings
        if not exit_layers or sorted(set(exit_layers)) != exit_layers or exit_layers[0] < 1:
            raise ConfigError(
                f"model.exit_layers is {exit_layers}; expected at least one layer, ascending, each once, from 1 on."
            )
        self.save_hyperparameters({"backbone": backbone, "exit_layers": exit_layers})
        self.backbone_name = backbone
        self.exit_layers = exit_layers
        self.depth = exit_layers[-1]  # layers that are run at most
        self.optim = optim
        self.lora = lora
        self.freeze_embeddings = freeze_embeddings
        self.head = head
        self.initial = initial
        # time of the last row that these weights have seen, as far as it is known
        self.trained_until = inf
        self.answers = answers or [" no", " yes"]  # dislike, like
        self.numbers = numbers
        self.items = items
        # learn a token for ratings of histories, too: known with the log, or a checkpoint
        self.ratings = False
        # whether the engine multiplies in bfloat16, see `compute_in`
        self.in_bfloat16 = False
        # 2. parts that are made once the folder of the weights is known: `configure_model`
        self.backbone: Backbone | None = None
        self.heads = nn.ModuleDict()
        # 3. scores: gathered batch by batch, then a table, which callbacks read
        self.collector = ScoreCollector()
        self.scores: polars.DataFrame | None = None
        # frozen weights are not in the checkpoint; on_load_checkpoint is stricter
        self.strict_loading = False
        # buffers travel with every checkpoint: the headline's exit layer, by validation's
        # tune fold (-1: not validated yet), and the feature baseline, fitted when training
        # starts (NaN: not fitted yet)
        self.chosen_exit: Tensor
        self.exit_0: Tensor
        self.register_buffer("chosen_exit", torch.tensor(-1))
        self.know_exit_0({})

    @property
    def data(self) -> InteractionData:
        """The DataModule that this run was given."""
        return cast(InteractionData, self.trainer.datamodule)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Load the backbone and make the heads; called once, before the first batch."""
        if self.backbone is not None:
            return
        self.ratings = self.data.rating_scale is not None
        with self.data.clock.stage("load model"):
            folder = resolve_model(self.backbone_name)
            mesh = shared_mesh(self.trainer.strategy)
            if mesh is None:
                backbone = Backbone.from_pretrained(folder, num_layers=self.depth)
                self.set_backbone(backbone, self.data.tokenizer)
                self.start()
            else:
                set_sharded_backbone(self, folder, self.data.tokenizer, mesh)

    def start(self) -> None:
        """Begin a fit: take the weights of `initial`, and note until when rows are trained on."""
        if self.trainer.state.fn != "fit":
            return
        split = self.data.split
        self.trained_until = read_until(split, "train")
        # a checkpoint that training goes on from has its own
        if self.initial is None or self.trainer.ckpt_path is not None:
            return
        content = read_initial(self.initial, self.exit_layers, self.backbone_name, split)
        copy_weights(content, self.state_dict(), frozen_names(self))
        self.trained_until = max(self.trained_until, content.get("trained_until", inf))

    def check(
        self, data: InteractionData, checkpoint: str | None = None, command: str = "fit"
    ) -> None:
        """Raise what is wrong with backbone, tokenizer and checkpoint; reads no weights and makes no features.

        `command` as of `check_reads`.
        """
        answer_tokens(data.tokenizer, self.answers)
        # its configuration alone: no weights are read
        config = usable_config(resolve_model(self.backbone_name), self.depth)
        positions = config.max_position_embeddings
        if data.context_tokens > positions:
            raise ConfigError(
                f"data.context_tokens is {data.context_tokens}, but {self.backbone_name} knows {positions} "
                f"positions; expected at most {positions}."
            )
        if checkpoint is not None:
            content = read_checkpoint(checkpoint, mmap=True)
            check_origin(content, self.exit_layers, self.backbone_name)
            check_reads(content.get("reads"), data, command)
        elif self.initial is not None:
            read_initial(self.initial, self.exit_layers, self.backbone_name, data.split)

    def set_backbone(self, backbone: Backbone, tokenizer: Any) -> None:
        """Use this backbone, with heads made from its language model head and the answers' tokens."""
        no, yes = answer_tokens(tokenizer, self.answers)
        # 1. heads start as the language model's own answer, so they need its LM head
        direction = backbone.answer_direction(yes, no)
        for layer in self.exit_layers:
            self.heads[str(layer)] = self.head(backbone.final_norm, direction)
        # 2. what is trained of the backbone
        if self.lora is not None:
            add_lora(backbone, self.lora)
        # the LM head has served: it is as large as the embeddings
        backbone.release_lm_head()
        if self.freeze_embeddings:
            backbone.embed_tokens.requires_grad_(False)
        # 3. what the embeddings learn beside words
        rated = (no[0], yes[0]) if self.ratings else None
        if self.items or self.numbers:
            # last: they are trained whatever is frozen
            backbone.learn(self.items, rated)
        self.backbone = backbone

    def compute_in(self, precision: object) -> None:
        """Have the engine multiply as Lightning does in this precision; it must be called before one is made."""
        self.in_bfloat16 = precision in ("bf16", "bf16-mixed")

    def know(self, data: InteractionData) -> None:
        """What ids of prompts' tokens say: texts of all items, those of requests included."""
        assert self.backbone is not None
        if self.items:
            self.backbone.embed_tokens.know(torch.from_numpy(data.item_vectors()))

    def on_fit_start(self) -> None:
        """Fit exit 0 on train targets; its weights are buffers, so they travel with the checkpoint."""
        targets = self.data.targets("train")
        exit_0 = FeatureBaseline.fit(
            self.data.retrieved_of(targets),
            targets["label"].to_numpy(),
            self.data.split.interactions.columns,
        )
        self.know_exit_0({"exit_0_terms": exit_0.terms})
        self.exit_0.copy_(torch.from_numpy(exit_0.to_array()))
        self.know(self.data)
        if self.items:
            assert self.backbone is not None
            embeddings = self.backbone.embed_tokens
            # projections that were trained before read items as they did then
            if not embeddings.moments[0].any():
                embeddings.standardise()

    def on_validation_start(self) -> None:
        """Refuse to score a model that was never trained, before the first batch."""
        self.feature_baseline()
        self.know(self.data)

    on_test_start = on_predict_start = on_validation_start

    def feature_baseline(self) -> FeatureBaseline:
        """Exit 0 as it was fitted by `fit` or loaded from a checkpoint."""
        # the buffer's numbers; NaN until `fit` has begun
        values = self.exit_0.cpu().numpy()
        if np.isnan(values).any():
            raise NotFittedError(
                "this model has never been trained: its exit 0 has no weights. Give `--ckpt_path` a checkpoint of "
                "a run, or make one with `python -m project fit --config ...`."
            )
        return FeatureBaseline.from_array(values, self.exit_0_terms)

    def know_exit_0(self, checkpoint: Mapping[str, Any]) -> None:
        """Make room for the exit 0 of a checkpoint, whose length is that of its log's columns."""
        terms = checkpoint.get("exit_0_terms", ())
        self.exit_0_terms = tuple(Term(*term) for term in terms)
        length = 2 + len(FEATURES) + len(terms)
        if "exit_0" not in self._buffers or len(self.exit_0) != length:
            room = torch.full((length,), torch.nan, device=self.device)
            self.register_buffer("exit_0", room)

    def forward(self, batch: Batch) -> Tensor:
        """Logits of a batch of n targets at every exit, (n, exits)."""
        assert self.backbone is not None
        # hidden states (B, T, H), carried from exit to exit
        state = self.backbone.embed(batch.tokens, batch.layout)
        outputs = list[Tensor]()  # (n,) logits of each exit
        start = 0  # layers that have run
        for layer in self.exit_layers:
            state = self.backbone.run(state, start, layer)
            # the n answer slots, numbered through all rows
            outputs.append(self.heads[str(layer)](state.hidden.flatten(0, 1)[batch.slots]))
            start = layer
        return torch.stack(outputs, dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean log loss of all heads, normalised by the targets of all processes."""
        logits: Tensor = self(batch)
        # targets of this process, then of all
        targets = torch.tensor(float(len(batch.label)), device=self.device)
        world = self.trainer.world_size
        if world > 1:
            targets = self.trainer.strategy.reduce(targets, reduce_op="sum")
        # gradients are averaged over processes, the loss is a sum over their targets: hence
        # the factor
        loss, per_head = exit_loss(logits, batch.label, targets / world)
        self.log("train/loss", loss.detach(), prog_bar=True)
        for layer, value in zip(self.exit_layers, per_head, strict=True):
            self.log(f"train/log_loss/exit_{layer}", value)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Collect scores; they become a table when all batches are done."""
        logits: Tensor = self(batch)
        self.collector.update(
            batch.row_id, batch.target_tokens, batch.stream_tokens, logits
        )
        return logits

    test_step = predict_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log every head on the `select` fold; choose the exit on `tune`."""
        scores = self._finish(self.data.split.rows)
        if self.trainer.sanity_checking:
            return
        self.scores = scores
        self._log_heads(exit_rows(scores, "valid", "select", draws=0), "select")
        chosen = choose_exit(scores)
        self.chosen_exit.fill_(-1 if chosen is None else chosen)

    def on_test_epoch_end(self) -> None:
        """Log every head, exactly."""
        self.scores = self._finish(self.data.split.rows)
        self._log_heads(exit_rows(self.scores, "test", draws=0), "test")

    def on_predict_epoch_end(self) -> None:
        """Keep the scores of all candidates."""
        assert self.data.requests is not None
        assert self.data.candidate_retrieved is not None
        rows = self.data.requests.table()
        self.scores = self._finish(rows, self.data.candidate_retrieved)

    def _finish(
        self, table: polars.DataFrame, retrieved: polars.DataFrame | None = None
    ) -> polars.DataFrame:
        """Scores of rows of a table, of the log without retrieved features of its own."""
        # gathered from all processes; rows that a sampler repeated stand once
        ids, values = self.collector.compute()
        self.collector.reset()
        # a row's id is its position in the table
        rows = table[ids[:, 0].cpu().numpy()]
        if retrieved is None:
            retrieved = self.data.retrieved_of(rows)
        exit_0 = self.feature_baseline().logits(retrieved)
        return scores_of(ids, values, rows, exit_0, self.exit_layers)

    def _log_heads(self, rows: Sequence[Mapping[str, Any]], prefix: str) -> None:
        for row in rows:
            for name in ("auc", "log_loss", "brier", "ece"):
                if row[name] is not None:
                    # every process computed the same numbers from the gathered scores:
                    # nothing to reduce
                    self.log(
                        f"{prefix}/{name}/exit_{row['layer']}",
                        row[name],
                        rank_zero_only=False,
                    )
        # the metric that chooses the checkpoint: NaN where a class is missing, never absent
        deepest = rows[-1]["auc"]
        self.log(
            f"{prefix}/auc/deepest",
            float("nan") if deepest is None else deepest,
            prog_bar=True,
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine decay."""
        assert self.backbone is not None
        # named groups, so that a checkpoint shows what learns how fast
        groups = parameter_groups(self.backbone, self.heads, self.optim)
        # Lightning clips no gradients of a fused optimizer under mixed precision, also
        # where nothing is scaled
        fused = "mixed" not in str(self.trainer.precision)
        optimizer = torch.optim.AdamW(groups, fused=fused)
        # not trainer.estimated_stepping_batches: it starts the loader before its
        # checkpointed position is restored
        factor = cosine_with_warmup(planned_steps(self.trainer, self.data.train_batches()))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Leave out what is frozen, name the base model that it comes back from, and say what the run reads."""
        # what the base model has already: nearly all of it where adapters are trained
        frozen = frozen_names(self)
        checkpoint["state_dict"] = {
            k: v for k, v in checkpoint["state_dict"].items() if k not in frozen
        }
        checkpoint["base_model"] = self.backbone_name
        checkpoint["exit_0_terms"] = [list(term) for term in self.exit_0_terms]
        if self._trainer is not None:
            chosen_until = read_until(self.data.split, "train", "valid")
            until = max(self.trained_until, chosen_until)
            checkpoint["reads"] = reads_of(self.data) | {"until": until}
            checkpoint["trained_until"] = self.trained_until

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of another model, protocol, prompt or retrieved features.

        Training that goes on is no exception: rows of the old train could be the new test's.
        """
        check_origin(checkpoint, self.exit_layers, self.backbone_name)
        self.know_exit_0(checkpoint)
        exit_0 = checkpoint["state_dict"].get("exit_0", self.exit_0)
        if len(exit_0) != len(self.exit_0):
            raise CheckpointError(
                "the checkpoint is of another version, whose exit 0 reads other features. Train again, or use that "
                "version."
            )
        self.trained_until = checkpoint.get("trained_until", inf)
        # frozen weights are the base model's, everything else must be there
        found = set(checkpoint["state_dict"])
        mine = set(self.state_dict())
        missing = mine - found - frozen_names(self)
        surplus = found - mine
        if missing or surplus:
            raise CheckpointError(
                f"the checkpoint lacks {sorted(missing)[:3]} and has unknown {sorted(surplus)[:3]} "
                f"({len(missing)} and {len(surplus)} in all): model.lora, "
                "model.freeze_embeddings or the numbers of data.prompt.segment differ from the run that made it. "
                "Use its config.yaml."
            )
        if self._trainer is not None:
            check_reads(checkpoint.get("reads"), self.data, self.trainer.state.fn or "")


def set_sharded_backbone(
    module: ExitRecommender, folder: str, tokenizer: Any, mesh: DeviceMesh
) -> None:
    """What `set_backbone` does, on all processes of a mesh; each keeps its part of every parameter.

    Only rank 0 reads the weights and holds the whole model, once; the others start without memory ("meta") and are sent
    their parts.
    """
    # 1. the whole model on rank 0, its shapes on the others
    reads = mesh.get_rank() == 0
    if reads:
        module.set_backbone(
            Backbone.from_pretrained(folder, num_layers=module.depth), tokenizer
        )
    else:
        config = AutoConfig.from_pretrained(folder)
        config.dtype = torch.float32  # as from_pretrained
        with torch.device("meta"):
            module.set_backbone(
                Backbone.from_config(config, num_layers=module.depth), tokenizer
            )
    assert module.backbone is not None
    module.start()
    # 2. a part of every parameter on every process
    whole = module.state_dict() if reads else {}
    for layer in module.backbone.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    # 3. memory for the parts, then their values
    if not reads:
        device = torch.device(mesh.device_type)
        module.backbone.to_empty(device=device)
        module.heads.to_empty(device=device)
        # its tables are computed, not stored
        module.backbone.rotary_emb = type(module.backbone.rotary_emb)(
            module.backbone.config
        ).to(device)
    set_model_state_dict(module, whole, options=WHOLE)


def exit_loss(
    logits: Tensor, labels: Tensor, global_targets: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of logits (n, K), its sums over targets divided by `global_targets`.

    Returns the mean of all heads, with gradient, and the loss of each head, (K,), detached.
    """
    expected = labels[:, None].expand_as(logits).to(logits.dtype)
    # (K,)
    per_head = (
        F.binary_cross_entropy_with_logits(logits, expected, reduction="none").sum(0)
        / global_targets
    )
    return per_head.mean(), per_head.detach()
