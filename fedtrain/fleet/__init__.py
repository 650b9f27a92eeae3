"""An experiment on a stock Flower fleet: a SuperLink, its SuperNodes, and our apps between them."""
