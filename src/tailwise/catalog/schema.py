"""The columns of the catalog's Parquet files."""

import pyarrow as pa

FINGERPRINT, PARQUET, REPLACES = "fingerprint", "parquet", "replaces"
NO_OFFSET = -1  # of a sample whose bytes aren't there: its shard is a file of metadata

# Columns of images (as "image.bytes") and captions, and the bytes of both in each row group.
_PARQUET = pa.struct(
    {"image": pa.string(), "caption": pa.string(), "groups": pa.list_(pa.field("element", pa.int64()))}
)
# The shard that held an earlier state of the file, and the bytes that both begin with, as far as the fingerprint shows.
_REPLACES = pa.struct({"shard": pa.int32(), "same_bytes": pa.int64()})
SHARD_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),  # stable id; draws and uids depend on it, never on the path
        pa.field("path", pa.string(), nullable=False),  # local path or URL; may be relocated
        pa.field("part", pa.int32(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("index_checksum", pa.string(), nullable=False),  # over names, offsets and sizes of the tar's members
        pa.field(FINGERPRINT, pa.string()),  # of its content, see shards/fingerprint.py; null: unknown
        pa.field(PARQUET, _PARQUET),  # null: no Parquet file with images
        pa.field(REPLACES, _REPLACES),  # null: its file was new
    ]
)

# Numeric columns of img2dataset's sidecar files and of DataComp's metadata ("scores") may follow these, as nullable float64.
SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("uid", pa.binary(16), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("image_extension", pa.string(), nullable=False),
        pa.field("image_offset", pa.int64(), nullable=False),  # bytes from the start of the tar, or NO_OFFSET
        pa.field("image_bytes", pa.int64(), nullable=False),
        pa.field("caption_offset", pa.int64(), nullable=False),
        pa.field("caption_bytes", pa.int64(), nullable=False),
        pa.field("json_offset", pa.int64()),
        pa.field("json_bytes", pa.int64()),
        pa.field("width", pa.int32()),  # pixels of the stored image, if the source says
        pa.field("height", pa.int32()),
    ]
)

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),  # the tar, or the file of embeddings
        pa.field("key", pa.string()),  # null: the whole file
        pa.field("detail", pa.string()),
        pa.field("rows", pa.int64(), nullable=False),  # how many samples or rows this line stands for
    ]
)
