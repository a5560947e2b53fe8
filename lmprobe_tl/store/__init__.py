"""The making of activation stores; `lmprobe_tl.activation_store` reads them."""
