from tests import tiny, exact
import numpy as np
def test_a(enumerable, base_folder, base_coder, tmp_path):
    print(base_coder.markers, enumerable.markers, base_coder.encode(" a b <|latent|>"), enumerable.coder.decode([1,4]))
    for f in (tiny.sentencepiece_bpe, tiny.sentencepiece_unigram, tiny.byte_level):
        t=f(); 
        print(t.backend_tokenizer.encode("the x é", add_special_tokens=False).tokens)
    assert 0
