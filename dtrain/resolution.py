"""What settings mean on the ranks and devices at hand: `auto` resolved, the rest refused."""

from collections.abc import Sequence

from dtrain.auto_size import with_size
from dtrain.config import Config
from dtrain.data.preparation import num_cores
from dtrain.distributed import World
from dtrain.errors import UserError
from dtrain.kernel_choice import choose_kernels
from dtrain.parts import choose_precision
from dtrain.rehearsal import possible_sizes
from dtrain.run_directory import RunDirectory


def resolve(config: Config, run: RunDirectory, world: World) -> tuple[Config, list[str]]:
    """Fill in what is `auto`, and say what the user should know of it.

    A begun run keeps what it had; of its kernels those that work here. The size of a micro-batch
    stays `auto` if the run is not begun, or cannot have it any more since the size of a step has
    changed.
    """
    begun = run.config if run.config_file.exists() else config
    threads, precision = config.run.threads, config.precision
    if threads == "auto":
        threads = begun.run.threads
    if threads == "auto":
        threads = max(1, num_cores() // world.local_size)
    if precision == "auto":
        precision = begun.precision
    if precision == "auto":
        precision = choose_precision(world.device)
    kept = begun.batch.tokens_per_micro_batch
    is_open = config.batch.tokens_per_micro_batch == "auto"
    if is_open and kept != "auto" and kept in possible_sizes(config, 1):
        config = with_size(config, kept)
    run_settings = config.run.model_copy(update={"threads": threads})
    config = config.model_copy(update={"run": run_settings, "precision": precision})
    kernels, notices = choose_kernels(config, world.device, begun.kernels)
    return config.model_copy(update={"kernels": kernels}), notices


def check_world(config: Config, world: World, notices: Sequence[str] = ()) -> None:
    """Refuse more ranks than there is work for, and what these ranks or devices cannot do.

    Args:
        config: resolved.
        world: the ranks.
        notices: what `resolve` had to say.

    Raises:
        UserError: naming what would work.
    """
    batch = config.batch
    if batch.tokens_per_micro_batch == "auto":
        if not possible_sizes(config, world.size):
            raise UserError(
                f"batch.tokens_per_micro_batch auto: batch.tokens_per_step {batch.tokens_per_step} "
                f"cannot be cut into at least {world.size} equal parts, one for each rank, that "
                f"hold a sentence of data.max_length {config.data.max_length}; start fewer ranks, "
                f"or set batch.tokens_per_step to {world.size * config.data.max_length}"
            )
    elif world.size > batch.micro_batches_per_step:
        count = batch.micro_batches_per_step
        raise UserError(
            f"{world.size} ranks cannot share the {count} micro-batches of a step; start at most "
            f"{count}, or set batch.tokens_per_micro_batch to "
            f"{batch.tokens_per_step // world.size} or less, a divisor of "
            f"batch.tokens_per_step {batch.tokens_per_step}"
        )
    if config.distributed.reduction == "tree" and world.size & (world.size - 1):
        nearest = 2 ** (world.size.bit_length() - 1)
        raise UserError(
            f"distributed.reduction tree needs 1, 2, 4, 8, ... ranks, not {world.size}; start "
            f"{nearest}, or use --distributed.reduction=ddp"
        )
    check_cuda_graph(config, world, notices)


def check_cuda_graph(config: Config, world: World, notices: Sequence[str] = ()) -> None:
    """Refuse to record what cannot be recorded.

    Args:
        config: with the attention kernel resolved.
        world: the ranks.
        notices: why it is this one, among other things.

    Raises:
        UserError: naming what `kernels.cuda_graph` needs.
    """
    settings = config.distributed
    why = "; ".join(notice for notice in notices if "attention" in notice)
    one_shape = "batches of one shape: kernels.attention packed or varlen"
    needs = {
        "a GPU": world.device.type == "cuda",
        one_shape + (f" ({why})" if why else ""): config.kernels.attention != "padded",
        "distributed.reduction flat, with several ranks": (
            world.size == 1 or settings.reduction == "flat"
        ),
        "distributed.reduction ddp or flat": settings.reduction != "tree",
        "distributed.shard_optimizer false": world.size == 1 or not settings.shard_optimizer,
    }
    missing = next((what for what, is_there in needs.items() if not is_there), None)
    if config.kernels.cuda_graph is True and missing is not None:
        raise UserError(f"kernels.cuda_graph true needs {missing}; or leave it out")
