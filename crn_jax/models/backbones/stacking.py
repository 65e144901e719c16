"""Equal blocks of a backbone as one stacked array, over which it scans, and back.

Two layouts of the same values. *Unstacked*, a block is a module of its own, `stage2_block5`: what a
backbone is initialised with, and what files of weights hold. *Stacked*, the blocks of a stage are
taken in pairs, of which the second is shifted in Swin, and `stage2_pairs` holds the first ones
under 'first', the second ones under 'second', each array with an axis [pairs] before its own. A
program of a stacked stage has two blocks, whatever its depth. States of a training are stacked.

What follows the structure of the parameters (gradients, moments of an optimizer, averages) is
stacked and unstacked alike, however deep in a tree.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MEMBERS = ("first", "second")
_BLOCK = re.compile(r"stage(\d+)_block(\d+)")
_PAIRS = re.compile(r"stage(\d+)_pairs")


def block_name(stage: int, block: int) -> str:
  """Name of a block's module, both from 0."""
  return f"stage{stage}_block{block}"


def pairs_name(stage: int) -> str:
  """Name of the module that holds a stage's stacked blocks."""
  return f"stage{stage}_pairs"


def stack(tree: Any) -> Any:
  """Stacks every stage of at least two pairs of blocks, if all its blocks are alike.

  They are not in ResNet, whose first block of a stage has a projection. A last block without a
  partner stays on its own. What is stacked already, or is not of a backbone, stays as it is.

  Args:
    tree: of numpy arrays, JAX arrays or, under `jax.eval_shape`, tracers.
  """
  return jax.tree.map(_stack_node, tree, is_leaf=lambda node: _holds(node, _BLOCK))


def unstack(tree: Any) -> Any:
  """Inverse of `stack`; numpy arrays become views."""
  return jax.tree.map(_unstack_node, tree, is_leaf=lambda node: _holds(node, _PAIRS))


def _holds(node: Any, pattern: re.Pattern) -> bool:
  return isinstance(node, Mapping) and any(pattern.fullmatch(str(name)) for name in node)


def _stack_node(node: Any) -> Any:
  if not _holds(node, _BLOCK):
    return node
  node = dict(node)
  depths: dict[int, int] = {}
  for name in node:
    if found := _BLOCK.fullmatch(name):
      depths[int(found[1])] = depths.get(int(found[1]), 0) + 1
  for stage, depth in depths.items():
    if depth < 4:  # Fewer than two pairs, or what is left of a stacked stage.
      continue
    blocks = [node[block_name(stage, j)] for j in range(depth)]
    if any(_form(block) != _form(blocks[0]) for block in blocks):
      continue
    paired = depth // 2 * 2
    for j in range(paired):
      del node[block_name(stage, j)]
    node[pairs_name(stage)] = {
      member: jax.tree.map(lambda *leaves: _stack_leaves(leaves), *blocks[k:paired:2])
      for k, member in enumerate(MEMBERS)
    }
  return node


def _unstack_node(node: Any) -> Any:
  if not _holds(node, _PAIRS):
    return node
  out = {}
  for name, value in node.items():
    found = _PAIRS.fullmatch(name)
    if not found:
      out[name] = value
      continue
    for member, stacked in value.items():
      for pair in range(jax.tree.leaves(stacked)[0].shape[0]):
        block = 2 * pair + MEMBERS.index(member)
        out[block_name(int(found[1]), block)] = jax.tree.map(lambda x, i=pair: x[i], stacked)
  return out


def _form(block: Any):
  """Structure and shapes of a block's arrays."""
  return jax.tree.structure(block), [leaf.shape for leaf in jax.tree.leaves(block)]


def _stack_leaves(leaves):
  return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)
