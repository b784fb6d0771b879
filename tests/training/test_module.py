"""Accumulation, clipping and evaluation of the module."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from qtrain.training.assembly import assemble
from qtrain.training.datamodule import WindowsDataModule, open_corpus
from qtrain.training.fit import make_trainer
from qtrain.training.module import QuantizedTransformer


class Gradients(Callback):
    """The gradient of the first step, before and after clipping."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = {n: p.grad.clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after = {n: p.grad.clone() for n, p in pl_module.named_parameters()}


def first_gradient(config, steps=1):
    """(gradient before clipping, after, module) of one step."""
    parts = assemble(config)
    data, module, seen = (
        WindowsDataModule(parts, open_corpus(parts)),
        QuantizedTransformer(parts),
        Gradients(),
    )
    trainer = make_trainer(
        parts,
        config["out"],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=parts.settings.accumulate(1),
        limit_val_batches=0,
        callbacks=[seen],
    )
    trainer.fit(module, data)
    return seen, module


def relative(a, b):
    """norm(a - b) / norm(b) over all parameters."""
    square = sum(float((a[n] - b[n]).square().sum()) for n in b)
    return (square / sum(float(t.square().sum()) for t in b.values())) ** 0.5


# Every quantizer of these shares scales within a token or within the weight, so that cutting the batch changes no
# range; bits of stochastic rounding are named by the token's place in the global batch.
PER_TOKEN = ["recipe=qpt", "precision=fp32", "batch_sequences=4"]


@pytest.mark.parametrize("rounding", ["", "_sr"])
def test_four_micro_batches_of_one_are_one_of_four(configure, tmp_path, rounding):
    knobs = [*PER_TOKEN, f"w=int8_row{rounding}", f"a=int8_row{rounding}", f"g=int8_column{rounding}"]
    whole, module = first_gradient(configure(tmp_path, *knobs))
    cut, other = first_gradient(configure(tmp_path, *knobs, "micro_batch_sequences=1"))
    # float32 sums in another order are 1e-6 apart; where that moves a value across a rounding threshold, one code
    # of 127 of one element changes: a handful of 30,000 elements, hence 1e-3
    assert relative(cut.before, whole.before) < 1e-3
    assert other.reading.loss == pytest.approx(module.reading.loss, abs=1e-5)


def test_other_bits_are_farther_apart_than_other_cuts(configure, tmp_path):
    knobs = [*PER_TOKEN, "w=int4_row", "a=int4_row_sr", "g=none"]
    whole, _ = first_gradient(configure(tmp_path, *knobs))
    cut, _ = first_gradient(configure(tmp_path, *knobs, "micro_batch_sequences=1"))
    config = configure(tmp_path, *knobs)
    parts = assemble(config)
    data, module, seen = (
        WindowsDataModule(parts, open_corpus(parts)),
        QuantizedTransformer(parts),
        Gradients(),
    )
    module.configure_model()
    module.surgery.clock.counters[0] = 1  # another seed of the bits, the same weights and data
    trainer = make_trainer(parts, tmp_path, max_steps=1, limit_val_batches=0, callbacks=[seen])
    trainer.fit(module, data)
    assert relative(seen.before, whole.before) > 30 * relative(cut.before, whole.before)


def test_the_norm_is_read_before_clipping(configure, tmp_path):
    seen, module = first_gradient(configure(tmp_path, "optimizer.clip_norm=0.01", "precision=fp32"))
    norms = [
        sum(float(g.square().sum()) for g in grads.values()) ** 0.5 for grads in (seen.before, seen.after)
    ]
    assert module.reading.grad_norm == pytest.approx(norms[0], rel=1e-5)
    assert module.reading.clipped
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_without_a_clip_the_gradient_stays(configure, tmp_path):
    seen, module = first_gradient(configure(tmp_path, "optimizer.clip_norm=null"))
    assert relative(seen.after, seen.before) == 0.0
    assert not module.reading.clipped


def test_configure_model_is_idempotent(configure, tmp_path):
    module = QuantizedTransformer(assemble(configure(tmp_path)))
    module.configure_model()
    model, clock = module.model, module.surgery.clock
    module.configure_model()
    assert module.model is model
    assert module.surgery.clock is clock


def test_loss_is_the_mean_of_the_token_losses(configure, tmp_path):
    """Against -log softmax written out, in float64."""
    module = QuantizedTransformer(assemble(configure(tmp_path, "recipe=none", "precision=fp32")))
    module.configure_model()
    tokens = torch.randint(0, 257, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = {"input": tokens[:, :-1], "target": tokens[:, 1:]}
    with torch.no_grad():
        losses = module.token_losses(batch)
        logits = module.model(batch["input"]).double()
    expected = logits.logsumexp(-1) - logits.gather(-1, batch["target"][..., None])[..., 0]
    assert losses.shape == (2, 32)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=0)
