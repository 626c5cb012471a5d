"""stub"""
from dartprune.ffn.weights import FFNWeights
def row_weights(layer):
    return FFNWeights(layer.gate.weight, layer.up.weight, layer.down.weight.t(), None, None, None, layer.activation, layer.act)
