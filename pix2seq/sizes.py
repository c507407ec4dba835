"""Named sizes of the paper, as flags: `--size r50` stands for these. Flags beside it win over them."""

# Encoder and decoder of section 4 of the paper and of the authors' published configs; all from scratch, as theirs.
SIZES: dict[str, dict[str, object]] = {
    "r50": {
        "backbone": "{model_type: resnet}",
        "backbone_stage": "c5",
        "hidden_size": 256,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "num_heads": 8,
        "mlp_size": 1024,
    },
    "r50-c4": {
        "backbone": "{model_type: resnet}",
        "backbone_stage": "c4",
        "hidden_size": 512,
        "encoder_layers": 12,
        "decoder_layers": 8,
        "num_heads": 16,
        "mlp_size": 2048,
    },
    "vit-b": {
        "backbone": "{model_type: vit, image_size: 640}",
        "backbone_stage": "c5",
        "hidden_size": 512,
        "encoder_layers": 0,
        "decoder_layers": 6,
        "num_heads": 16,
        "mlp_size": 2048,
    },
    "vit-l": {
        "backbone": "{model_type: vit, image_size: 640, hidden_size: 1024, num_hidden_layers: 24, "
        "num_attention_heads: 16, intermediate_size: 4096}",
        "backbone_stage": "c5",
        "hidden_size": 512,
        "encoder_layers": 0,
        "decoder_layers": 8,
        "num_heads": 16,
        "mlp_size": 2048,
    },
}
