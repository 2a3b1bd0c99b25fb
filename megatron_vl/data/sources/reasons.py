"""Every code under which a source refuses something, with its meaning.

Codes of the sample form itself (`broken_json`, `image_count`, ...) are listed at `data/sample.parse_sample`,
those of image files at `data/image_checks.REASONS`, and both apply to what comes out of a source too. The
codes below are new here. `docs/data.md` shows the same table; a test keeps the two equal.
"""

REASONS = {
    # conversations in the ShareGPT shape (sharegpt.py)
    "two_forms": "a record spells the same thing twice, e.g. image and images, or messages and conversations",
    # GUI trajectories (gui.py)
    "missing_action": "an assistant turn without an action, though the schema asks for one",
    "bad_action": "an action that is no JSON object with a name",
    "unknown_action": "an action that the schema does not list",
    "unknown_parameter": "a parameter that the schema does not list for this action",
    "missing_parameter": "a parameter that this action needs is not given",
    "bad_parameter": "a parameter of another type or outside its range",
    # HTML pages (html_page.py, html_source.py)
    "page_too_large": "a page of more bytes than the limit",
    "too_deep": "elements nested more deeply than the limit",
    "too_many_blocks": "more text blocks than the limit",
    "too_many_images": "more images than the limit",
    "bad_encoding": "bytes that are not text in the encoding that the page declares, or one that is not known",
    "failed_images": "too large a share of the page's images cannot be used",
    "empty_page": "neither text nor image is left",
    # single images of a page, which are left out and counted while the page is kept
    "image_remote": "an image on the network; nothing is fetched",
    "image_inline": "an image written into the page as a data: URL",
    "image_no_source": "an img element without a source",
    "image_bad_path": "a source that is not a usable path",
    # tar shards (tar_scan.py, webdataset.py)
    "bad_header": "a header that is damaged; the scan goes on at the next good one",
    "truncated_member": "the tar ends inside this member, or without its end mark right after it",
    "bad_member_name": "an absolute name, one with .. or one that is not UTF-8",
    "link": "a link; what it points to is not part of the data",
    "special_member": "a device or pipe",
    "sparse_member": "a sparse file, whose bytes do not lie in one piece",
    "duplicate_member": "two members of one sample with the same extension",
    "duplicate_key": "the members of this sample do not lie together, or its key occurs twice",
    "no_text": "a sample without .json or .txt",
    "text_too_large": "a line, .json or .txt of more bytes than the limit",
    "after_end": "bytes behind the end mark of the tar",
    "missing_member": "a record names an image that its sample does not have",
    # pre-tokenised text (megatron_bin.py)
    "empty_document": "a document without tokens",
    "id_outside_vocabulary": "a token id below 0 or not below the size of the vocabulary",
    "image_id_in_text": "an id that only images may bring",
    # tables (parquet.py, table_rows.py)
    "bad_column": "a value of a type that this column cannot have",
    "no_image_bytes": "an image that has neither bytes nor a path",
    # files and folders (files.py, html_source.py)
    "not_a_file": "a pipe or device where a file was expected",
    "changed": "the file is not what it was when the folder was listed",
}
