"""Low-bit quantization of PyTorch networks: methods, module swap, calibration, measures."""

from .absorb import absorb_relus, restore_relus
from .calibrate import bake, calibrate, ranges, reestimate_batch_norm
from .core import WIDTHS, QTensor, Quantizer, Range, Site
from .describe import describe, describe_text
from .fold import fold_batch_norm
from .layers import QuantLayer
from .metrics import (
    bit_operations,
    effectiveness,
    ideal_bytes,
    layer_report,
    max_levels,
    scales,
    sqnr,
)
from .oscillation import (
    OscillationShares,
    OscillationTracker,
    dampening,
    weight_dampening,
)
from .policy import (
    LayerPlan,
    QuantizerChoice,
    QuantPolicy,
    Rule,
    plan_as_dict,
    plan_from_dict,
)
from .probing import LayerFacts, Probe, probe
from .quantizers import QUANTIZERS  # importing the folder registers every method
from .record import record
from .registry import Registry, UnknownNameError
from .regularizers import (
    activation_bin_regularization,
    bin_regularization,
    collect_inputs,
    weight_bin_regularization,
)
from .stepping import Stepping
from .swap import (
    apply_plan,
    float_state_dict,
    layer_plan,
    quant_layers,
    quantize_model,
    quantizer_parameters,
    unquantized,
)

__all__ = [
    "QUANTIZERS",
    "WIDTHS",
    "LayerFacts",
    "LayerPlan",
    "OscillationShares",
    "OscillationTracker",
    "Probe",
    "QTensor",
    "QuantLayer",
    "QuantPolicy",
    "Quantizer",
    "QuantizerChoice",
    "Range",
    "Registry",
    "Rule",
    "Site",
    "Stepping",
    "UnknownNameError",
    "absorb_relus",
    "activation_bin_regularization",
    "apply_plan",
    "bake",
    "bin_regularization",
    "bit_operations",
    "calibrate",
    "collect_inputs",
    "dampening",
    "describe",
    "describe_text",
    "effectiveness",
    "float_state_dict",
    "fold_batch_norm",
    "ideal_bytes",
    "layer_plan",
    "layer_report",
    "max_levels",
    "plan_as_dict",
    "plan_from_dict",
    "probe",
    "quant_layers",
    "quantize_model",
    "quantizer_parameters",
    "ranges",
    "record",
    "reestimate_batch_norm",
    "restore_relus",
    "scales",
    "sqnr",
    "unquantized",
    "weight_bin_regularization",
    "weight_dampening",
]
