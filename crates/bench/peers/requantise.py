# The same weights in another GGUF format, for a peer that may be faster with it.
#
#     python requantise.py MODEL.gguf Q8_0|Q4_0|BF16 OUT.gguf
#
# Quantised matrices are expanded and quantised again with the package `gguf`; what has more bits than the format stays as it is (Q4_0 leaves
# an embedding of 8 bits alone), as do floats. Written beside and renamed. Written to be run by the crate `bench`.
import os
import sys

import gguf
from gguf.quants import dequantize, quantize

path, name, out = sys.argv[1:4]
target = gguf.GGMLQuantizationType[name]
FLOATS = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


def bits(kind):
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    return 8 * size / weights


reader = gguf.GGUFReader(path)
writer = gguf.GGUFWriter(out + ".part", reader.get_field("general.architecture").contents())
for field in reader.fields.values():
    if field.name.startswith("GGUF.") or field.name == "general.architecture":
        continue
    kind = field.types[0]
    inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
for tensor in reader.tensors:
    kind, data = tensor.tensor_type, tensor.data
    if kind not in FLOATS and not (bits(target) < 6 and bits(kind) > 6):
        kind, data = target, quantize(dequantize(data, kind), target)
    writer.add_tensor(tensor.name, data, raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
os.rename(out + ".part", out)
