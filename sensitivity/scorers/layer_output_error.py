"""Squared error at the layer's own output: what GPTQ and its family minimize.

E ||W x - W_q x||^2 = sum of dW H dW' over output channels, H the second moments of the layer's inputs
(Frantar et al. 2022, arXiv:2210.17323). The moments serve every scheme.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sensitivity.choice import Choice, Measured


class LayerOutputError:
    """Mean over positions of ||dW x||^2, in squared units of the layer's output."""

    def score(self, choice: Choice) -> Measured:
        """One pass over the scoring part for many layers, none per scheme.

        Embeddings multiply nothing, and inputs of fused experts may be inside a module that does not tell how
        it makes them: there the inputs are taken as equally likely, of length 1. The moments hold no single
        samples: no standard error.
        """
        from quant.layers import EXPERT_OPS
        from quant.ops import to_matrix
        from sensitivity.choice import Measured

        error = to_matrix(choice.weight_error.reshape(choice.weight.shape), choice.layer.op)
        inputs = choice.weights.inputs(choice.layer.name)
        if not inputs.samples and choice.layer.op in ("embedding", *EXPERT_OPS):
            note = f"layer_output_error of layer {choice.layer.name!r} takes its inputs as equally likely."
            return Measured(float(error.double().square().sum()) / len(error), None, 0, note=note)
        return Measured(float(inputs.output_errors(error).double().sum()), None, 0)
