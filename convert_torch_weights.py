"""Converts timm's Swin Transformer weights for `model.pretrained`.

python convert_torch_weights.py --input=model.safetensors --output=weights/swin_large
"""

from absl import app, flags

from crn_jax.convert import timm

_INPUT = flags.DEFINE_string(
  "input", None, "timm state dict: .safetensors, or .pth/.bin (needs PyTorch to read it)."
)
_OUTPUT = flags.DEFINE_string("output", None, "File to write.")
_FORCE = flags.DEFINE_bool("force", False, "Replace the output file if it exists.")


def main(argv):
  del argv
  try:
    print(timm.convert_file(_INPUT.value, _OUTPUT.value, replace=_FORCE.value))
  except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
    raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
  flags.mark_flags_as_required(["input", "output"])
  app.run(main)
