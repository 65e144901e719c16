"""Rematerialisation: what a block keeps for its gradient, and what is computed again for it."""

import flax.linen as nn
import jax

from crn_jax.errors import UserError

# What a block gives this name (`jax.ad_checkpoint.checkpoint_name`) is kept by 'dots': results of
# linear layers and of attention, and a batch's statistics, not the larger or cheaper ones between
# them. Results are named after the bias: before it, the bias could not be added by the product.
KEPT = "kept"

# model.remat -> what jax.checkpoint may keep besides a block's input.
_POLICIES = {
  "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
  "full": jax.checkpoint_policies.nothing_saveable,
}
CHOICES = ("none", *_POLICIES)


def rematerialised(
  block: type[nn.Module], remat: str, *, scanned: bool = False, static_argnums: tuple = ()
) -> type[nn.Module]:
  """A class of blocks whose intermediate values are computed again in the backward pass.

  Args:
    block: class of the block; parameters keep their names.
    remat: 'none' keeps what the gradient needs, 'full' the block's input alone, 'dots' also
      what is named `KEPT`.
    scanned: whether it is the body of a scan, in which XLA cannot undo this.
    static_argnums: arguments of `__call__` that are no arrays, self being 0.

  Raises:
    UserError: on another `remat`.
  """
  if remat not in CHOICES:
    raise UserError(f"model.remat must be one of {', '.join(map(repr, CHOICES))}, not {remat!r}")
  if remat == "none":
    return block
  return nn.remat(
    block, policy=_POLICIES[remat], prevent_cse=not scanned, static_argnums=static_argnums
  )
