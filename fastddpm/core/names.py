"""The names that options take, in a file without torch: `fastddpm --help` shows them without importing it."""

SHIPPED_MODEL = "fashion-mnist"
SHIPPED_CONDITIONAL = "fashion-mnist-classes"
SHIPPED_SOUNDS, SHIPPED_TEXTS = "spoken-digits", "names"
SHIPPED_IMAGES = (SHIPPED_MODEL, SHIPPED_CONDITIONAL)
SHIPPED_MODELS = (*SHIPPED_IMAGES, SHIPPED_SOUNDS, SHIPPED_TEXTS)
SHIPPED_CLASSIFIER = "fashion-mnist"

PRECISION_NAMES = ("fp32", "tf32", "bf16", "fp16")
ENGINES = ("eager", "compiled", "graph", "compiled+graph")

SAMPLERS = ("ddpm", "ddim")
PARALLEL = ("off", "bits", "law")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "sqrt")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

TEXT_CODES, AUDIO_CODES = ("bits", "embeddings"), ("waveform", "spectrogram")
SCALE_NAMES = ("fid", "unit", "signed", "bytes")  # of pixels, for the networks of `fastddpm fid`

TRAIN_PRECISIONS = ("auto", "fp32", "tf32", "bf16")  # fp16 gradients would need a scaled loss
TRAIN_ENGINES = ("auto", "eager", "compiled", "compiled+graph")
TRAIN_VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")
