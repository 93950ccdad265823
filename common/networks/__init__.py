"""Plain CIFAR-size backbones, built as stem, stages and head so that papers can recompose them."""
