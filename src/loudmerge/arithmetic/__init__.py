"""W + dW, rounded: tensor functions without a file or a plan of their own."""
