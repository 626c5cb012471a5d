"""Loss against the bits that are read for each FFN weight: formats of weights, alone and with methods on them."""
