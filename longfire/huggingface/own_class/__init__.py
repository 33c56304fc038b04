"""longfire's own class of transformers, for models that no class of transformers or fla has.

    import longfire
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("exported")

    config.py   config.json                        <-> LongfireConfig (own_config.py says how)
    padding.py  ids, attention_mask, position_ids   -> the input of longfire's model
    cache.py    the states and keys of the layers   -> past_key_values of `generate`
    model.py    LongfireForCausalLM: longfire's model with the interface of transformers

Both classes are registered by auto_classes.py. The forward is that of longfire's model.
"""
