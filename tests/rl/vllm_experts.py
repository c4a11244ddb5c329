"""Lets vLLM on CPUs read new weights of experts: `vllm serve --worker-extension-cls vllm_experts.Extension`.

Its kernel wants them packed. vLLM 0.32 packs them when it starts and not after a reload (`is_weight_update` in
unquantized_fused_moe_method.py): then it reads plain weights as packed ones. On GPUs nothing is packed so.
"""

from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

set_up = UnquantizedFusedMoEMethod._setup_kernel


def set_up_and_pack(self, layer, w13, w2):
    is_update = self.moe_kernel is not None
    set_up(self, layer=layer, w13=w13, w2=w2)
    if is_update:
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)


UnquantizedFusedMoEMethod._setup_kernel = set_up_and_pack


class Extension:
    """Nothing is added to the worker; it imports this module."""
