"""longfire's own class of transformers, for models that no class of transformers or fla has.

    import longfire
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("exported")

    config.py   config.json                              <-> LongfireConfig (huggingface/own_config.py says how)
    padding.py  ids, attention_mask, position_ids         -> what longfire's model is given
    cache.py    what layers keep                          -> past_key_values of `generate`
    model.py    LongfireForCausalLM: longfire's model behind transformers' interface

Both classes are registered by auto_classes.py. Nothing here is computed a second time.
"""
