"""Text to batches: documents, tokenizers, packing, and deterministic random access."""

from shardlm.data.completions import Completions as Completions
from shardlm.data.completions import load_examples as load_examples
from shardlm.data.encoder import Encoder as Encoder
from shardlm.data.examples import Example as Example
from shardlm.data.examples import Piece as Piece
from shardlm.data.examples import are_examples as are_examples
from shardlm.data.examples import read_examples as read_examples
from shardlm.data.kept import files_of as files_of
from shardlm.data.loader import Batch as Batch
from shardlm.data.loader import Batches as Batches
from shardlm.data.loader import Epoch as Epoch
from shardlm.data.loader import TextData as TextData
from shardlm.data.loader import load as load
from shardlm.data.packing import Packed as Packed
from shardlm.data.packing import Rows as Rows
from shardlm.data.shifted import batch as batch
from shardlm.data.text import Document as Document
from shardlm.data.text import read_documents as read_documents
from shardlm.data.text import split_documents as split_documents
from shardlm.data.text import standard_library as standard_library
from shardlm.data.tokens import BPETokenizer as BPETokenizer
from shardlm.data.tokens import ByteTokenizer as ByteTokenizer
from shardlm.data.tokens import Tokenizer as Tokenizer
from shardlm.data.tokens import make_tokenizer as make_tokenizer
