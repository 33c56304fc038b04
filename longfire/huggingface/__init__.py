"""Models of Hugging Face: read, written, compared. The files in the order of the flow:

family.py                   what the table of a family consists of
family_layers.py            which layer of a family has which mixer
family_reading.py           a config.json of a family -> our model config
family_writing.py           our model config -> the config.json of a family, or why it has none
families_llama.py           families of transformers with Llama's blocks: Llama, Mistral, Qwen
families_gpt.py             GPT-2 and nanochat in transformers
families_fla.py             families of fla whose blocks are Llama's
families_blocks.py          families of fla with blocks of their own: Mamba, Mamba-2, Samba, RWKV-7
families.py                 all families; the one that a config or a model is of
undeclared.py               keys of a config.json that the class of transformers does not declare
own_config.py               config.json of our own class (own_class/)
tensors.py                  their tensors <-> our parameters
hub_models.py               models of the hub as folders here
weight_files.py             the tensors in a folder of weights
load.py                     a folder of weights -> a model
checksums.py                SHA256SUMS of an export
comparing.py                a check that raises, and transformers without its messages
check_tokenizer.py          whether transformers reads a tokenizer as longfire does
check.py                    what an export or an import is compared with
vit.py                      ViTForImageClassification of transformers <-> our models of images
vit_images.py               preprocessor_config.json <-> our settings of images
vit_export.py               a model of images -> a folder of weights
import_.py                  `longfire import`: weights -> a run folder
export.py                   `longfire export`: a model -> a folder of weights
model_card.py               the model card of an export
convert.py                  `longfire convert`: another architecture with every matching weight
convert_places.py           which tensors of two models have the same use
convert_settings.py         the settings that it takes from its source
convert_report.py           all that became of a source, as tables
transformers_model.py       any class of transformers as it is (model.backend = "transformers")
transformers_files.py       its weights read, saved and compared
transformers_documents.py   whether it separates packed documents
"""
