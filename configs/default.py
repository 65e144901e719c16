"""Every knob with its default. The other configurations change only what differs.

A configuration takes names after a colon, joined by commas: a preset, a backbone, or both, and
`equal`: `--config=configs/fashioniq_dress.py:tirg`, `:swin_base`, `:crn_released,swin_base`,
`:tirg,equal`. Without them they are `crn` and the preset's own backbone; what they stand for is in
`configs/presets.py`. Any field can be changed on the command line: `--config.batch_size=32`. What a
field may be is checked by `crn_jax/configuration.py`, where a new field needs a rule.
"""

import ml_collections
from ml_collections import config_dict

from configs import presets


def get_config(names: str = "") -> ml_collections.ConfigDict:
  """Configuration of CRN with Swin-L on FashionIQ, all three categories.

  Args:
    names: see `presets.parse`.

  Raises:
    flags.IllegalFlagValueError: on other names; it reaches the terminal as one line.
  """
  chosen = presets.parse(names)
  config = ml_collections.ConfigDict()
  config.name = "default"  # Names the work directory, runs/<name>.
  config.preset = chosen.label  # For the record: what it stands for is in the fields below.
  config.method = "crn"  # How a model is trained and asked: `crn_jax/methods/registry.py`.
  config.seed = 599
  config.num_epochs = 50
  config.batch_size = 16  # Over all devices.
  # 'alternating': local, then global against the updated local (as published), 6 backbone passes.
  # 'simultaneous': both against the same parameters, 4 passes.
  config.update_mode = "alternating"

  config.data = data = ml_collections.ConfigDict()
  data.dataset = "fashioniq"  # A name of crn_jax/input_pipeline/registry.py, see docs/data.md.
  data.root = "data/fashioniq"  # Folder of the data set; docs/data.md shows its layout.
  data.category = "all"  # 'dress', 'shirt', 'toptee' or 'all' (joint training); FashionIQ.
  # Missing or damaged images and bad entries: 'error' lists them before training starts; 'skip'
  # leaves out the triplets, queries and gallery images that they affect, and counts them.
  data.on_missing = "error"
  # The two captions of an entry: 'joined' to one text (as published), 'both_orders' (two texts),
  # 'separate' (two texts of one caption), 'mixed' (one sentence: 'A and b' is asked; 'a and b', 'b
  # and a', a or b is drawn for training). Texts of Shoes and Fashion200k are single captions.
  data.captions = "joined"
  # Shoes: 'released' lists most pairs twice, in training and evaluation, as the release and hence
  # the published numbers do; 'unique' lists every pair inside a split once.
  data.shoes_pairs = "released"
  data.max_words = 32  # Texts are padded to this and cut beyond it, markers included.
  data.image_size = 224  # Side of the crop that the model sees, in pixels.
  # Short side before the crop, in pixels; both sides, for towers whose pictures are squeezed.
  data.resize = 256
  # Images with a larger ratio of their sides are padded with zeros to it first; None pads none.
  data.max_ratio = config_dict.placeholder(float)
  data.augment = "random_crop_flip"  # Or 'none': the centre crop, as the release on Shoes.
  # Folder for images that --mode=prepare resizes once; training then reads those. '' decodes files.
  data.prepared = ""
  data.features = "features"  # Folder in which features of frozen towers are kept.
  data.cache_images = False  # Keep decoded training images in memory: for small sets only.
  # Markers around captions: 'tokens' (BOS, AND, EOS with ids of their own) or 'words' (as the
  # release, whose tokeniser loses them: "bos c0 and c1 eos").
  data.markers = "tokens"

  config.model = model = ml_collections.ConfigDict()
  model.backbone = backbone = ml_collections.ConfigDict()
  # 'swin_tiny', 'swin_small', 'swin_base', 'swin_large', 'resnet18' or 'resnet50'.
  backbone.name = chosen.backbone
  # Sizes, for small models; None is what the name stands for.
  backbone.depths = config_dict.placeholder(tuple)  # Blocks a stage.
  backbone.embed_dim = config_dict.placeholder(int)  # Swin only, as the next four.
  backbone.num_heads = config_dict.placeholder(tuple)  # A stage.
  backbone.patch_size = config_dict.placeholder(int)  # 4
  backbone.window_size = config_dict.placeholder(int)  # 7
  backbone.drop_path_rate = config_dict.placeholder(float)  # 0.1
  backbone.width = config_dict.placeholder(int)  # ResNet only: channels after the stem, 64.
  # What pictures are normalised with, by channel, in units of the full range, and resized with
  # ('bilinear' or 'bicubic'); None is the named backbone's.
  backbone.mean = config_dict.placeholder(tuple)
  backbone.std = config_dict.placeholder(tuple)
  backbone.interpolation = config_dict.placeholder(str)
  # Folder made by convert_torch_weights.py; '' starts from random values. Unless it is
  # set, it follows the backbone's name.
  model.pretrained = "weights/" + backbone.get_ref("name")
  # Width that the last map is lifted to; None keeps the backbone's, without a layer.
  model.map_dim = config_dict.placeholder(int)
  model.map_dim = 2048
  model.feature_dim = 1024  # Of vectors and words; a multiple of 32.
  model.word_dim = 768
  model.keep_map = True  # Keep the positions of the last map; False pools it to 1 x 1.
  # How image and text are composed, if the method is 'single': a name of
  # crn_jax/models/composition/registry.py.
  model.composition = config_dict.placeholder(str)
  # Of 'single': 'lstm', 'bigru' or 'convolution', see crn_jax/models/text/registry.py.
  model.text_encoder = "lstm"
  model.aggregation = "used"  # HAT: 'used', 'discarded' (computed without effect) or 'none'.
  model.mask_padding = True  # Padding takes no part; False: it acts like words, as released.
  model.attention_temperature = ml_collections.ConfigDict({"local": 7.0, "global": 4.0})
  # 'float32' or 'bfloat16', of backbones and towers. What blocks of Swin and of towers add to is
  # float32, and all that follows.
  model.dtype = "float32"
  # Of float32 products on a GPU: 'default' is TF32 on recent cards, 'highest' all of float32.
  # Scores of losses and of retrieval always have the latter.
  model.precision = "default"
  # What a backbone's blocks keep for the gradient: 'none' is all that it needs; 'dots' the results
  # of linear layers and attention; 'full' their inputs alone. The rest is computed again. On a GPU
  # 'dots' takes less memory and less time than 'none'; on a CPU it takes more time.
  model.remat = "dots"
  # Description of a pair of towers, for methods that work on one: sizes, preprocessing. It is taken
  # from the folder `model.pretrained` when a run begins.
  model.encoder = ml_collections.ConfigDict()

  config.zero_shot = zero_shot = ml_collections.ConfigDict()  # Of the method 'zero_shot'.
  # A query is the 'sum' of its image's and its text's vector, their 'slerp' (the point on the arc
  # between them), or one of the two alone, 'image' or 'text'.
  zero_shot.query = "sum"
  zero_shot.slerp_weight = 0.5  # Share of the text, from 0 (image) to 1 (text).

  config.loss = ml_collections.ConfigDict({  # Weights of the terms; 0 leaves the work out, too.
    'classification': 1.0,
    'cross_branch': 1.0,
    'mutual_kl': 1.0,
    'perceptual': 1.0,  # Local branch only.
    'modification': 1.0,
    'auxiliary': 1.0,
    'triplet': 0.0,  # Of 'single': hinge against semi-hard negatives of the batch, both ways.
    'correction': 0.0,  # Of DCNet: that of the paper's s_c, and of its s_j, see
    'joint': 0.0,  # crn_jax/models/composition/dcnet.py.
  })  # fmt: skip

  config.optimizer = optimizer = ml_collections.ConfigDict()
  optimizer.learning_rate = 3e-5
  optimizer.algorithm = "adam"  # Or 'adamw', 'sgd'.
  optimizer.momentum = 0.9  # Of 'sgd'.
  # 'adam', 'sgd': added to the gradient, as in PyTorch; 'adamw': to the update behind Adam.
  optimizer.weight_decay = 1e-6
  optimizer.betas = (0.9, 0.999)  # Of the moving averages of gradients and of their squares.
  optimizer.epsilon = 1e-8  # Added to the root of the second.
  optimizer.schedule = "step"  # 'step' (published) or 'cosine' (to zero at the last step).
  # 'step' multiplies the rate by the factor at epochs 20, 40, ... below max_decay_epoch. The
  # published FashionIQ command sets 20, so that its rate never decays; the release's default, 40,
  # would decay once.
  optimizer.decay_every_epochs = 20
  optimizer.decay_factor = 0.1
  optimizer.max_decay_epoch = 20
  optimizer.warmup_steps = 0  # Steps over which the rate rises linearly from zero.
  optimizer.clip_norm = 0.0  # Clip each branch's gradient to this global norm; 0 does not.
  optimizer.logit_scale_rate = 1.0  # Factor on the learning rate of the trained temperature.
  optimizer.backbone_rate = 1.0  # Factor on the learning rate of the (pretrained) backbone.
  # Evaluate an exponential moving average of the parameters with this decay; 0 does not (as
  # published). Early on the decay is smaller, (1 + step) / (10 + step), to forget the start.
  optimizer.ema_decay = 0.0

  # By which 'triplet' wants a target to be nearer than a negative, in squared distances of unit
  # vectors: half of it in cosines.
  config.single = ml_collections.ConfigDict({"margin": 0.2})
  config.clip4cir = ml_collections.ConfigDict({"dropout": 0.5})  # Of the combiner's hidden layers.
  config.bank = ml_collections.ConfigDict({"temperature": 0.02})  # Divides the cosines.

  # The training before that of 'clip4cir' and 'bank': both towers are trained, so that the sum of
  # an image's and a text's features is near the target's.
  config.finetune = finetune = ml_collections.ConfigDict()
  finetune.num_epochs = 0  # 0 leaves the towers as they are.
  finetune.batch_size = 128  # Over all devices.
  finetune.evaluate_every_epochs = 1  # The towers that are best then are those that are taken.
  finetune.optimizer = ml_collections.ConfigDict(optimizer.to_dict())  # As `optimizer`.

  config.parallel = ml_collections.ConfigDict({"mode": "shard_map"})  # Or 'pmap'.

  config.eval = evaluation = ml_collections.ConfigDict()
  evaluation.batch_size = 64  # Images over all devices.
  evaluation.every_epochs = 1
  evaluation.recall_at = (1, 10, 50)
  # A query's own reference image is not ranked, where the protocol leaves it open; see
  # docs/evaluation.md.
  evaluation.exclude_reference = True
  # Metric that chooses the checkpoint kept as best: protocol/metric of eval.json.
  evaluation.best_metric = "val_split/R@10"

  config.log_every_steps = 50
  # Besides at every evaluation: what a lost machine costs at most.
  config.checkpoint_every_steps = 500
  # Leave out of a GPU's programs whatever gives other sums in another order; see docs/runs.md.
  config.deterministic_ops = False
  # First and last step of a trace for TensorBoard's profiler, e.g. (10, 12); () records none.
  config.profile_steps = ()
  presets.apply(config, chosen)
  return config
