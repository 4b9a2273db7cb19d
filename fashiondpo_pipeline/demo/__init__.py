"""How the embedded default `data/fashion_mini` is made, from the pictures of Fashion-MNIST."""
