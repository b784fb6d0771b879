"""Low-bit collectives: what processes send each other while they train, as codes and scales.

    settings     which of the two, and how: ``trainer.gather_weights``, ``trainer.reduce_gradients``
    row_format   rows of a matrix as bytes, and back
    exchange     the two collectives that carry such rows, and what they carried, in bytes
    gather       the all-gather of weights under FSDP2
    reduce       the reduction of gradients with error feedback, under DDP and FSDP2
    low_bit      both, as a run has them: attached to a model, counted, saved

``torch.distributed`` alone: no Lightning, so that a plain loop has them as well. docs/communication.md has the
equations, and what is exact.

W processes, R rows (dim 0) of a parameter, K columns (all else), c = ceil(R / W) rows a process, as FSDP2 cuts them.
"""
