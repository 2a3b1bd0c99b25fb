"""From files to micro-batches: image geometry and pixels, conversations, tokens, sampling order, batches."""
