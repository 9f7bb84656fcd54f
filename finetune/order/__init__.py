"""Which documents make which sequence, as arithmetic: order, packing and the CM3 objective's spans."""
