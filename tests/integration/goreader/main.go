// Goreader reads and writes lazily pullable layers with the Go library that the stargz snapshotter
// itself uses, so that a test can compare p2pcache's own reader and writer with it.
//
//	goreader read  -blob FILE -toc DIGEST     prints every file with its chunks, as the library sees them
//	goreader write -tar FILE -blob FILE ...   makes a layer from a tar
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// Chunk is one chunk of a file: where its member starts and ends, and what is in it.
type Chunk struct {
	Offset      int64  `json:"offset"`
	NextOffset  int64  `json:"nextOffset"`
	InnerOffset int64  `json:"innerOffset"`
	Size        int64  `json:"size"`
	Digest      string `json:"digest"`
}

// File is one regular file with the digest of what OpenFile delivered.
type File struct {
	Name   string  `json:"name"`
	Size   int64   `json:"size"`
	Sha256 string  `json:"sha256"`
	Chunks []Chunk `json:"chunks"`
}

// Reading is what `read` prints. VerifyTOC is the error of that call, if any: the library's own
// verifier refuses layers in which several chunks share a member, the snapshotter does not use it.
type Reading struct {
	VerifyTOC string   `json:"verifyTOC"`
	Names     []string `json:"names"`
	Files     []File   `json:"files"`
}

// Writing is what `write` prints.
type Writing struct {
	TOCDigest string `json:"tocDigest"`
	DiffID    string `json:"diffID"`
	Size      int64  `json:"uncompressedSize"`
}

type zstdCompression struct {
	*zstdchunked.Compressor
	*zstdchunked.Decompressor
}

func main() {
	if len(os.Args) < 2 {
		fail(errors.New("usage: goreader read|write ..."))
	}
	var result any
	var err error
	switch os.Args[1] {
	case "read":
		result, err = read(os.Args[2:])
	case "write":
		result, err = write(os.Args[2:])
	default:
		err = fmt.Errorf("unknown command %q", os.Args[1])
	}
	if err != nil {
		fail(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "goreader:", err)
	os.Exit(1)
}

func read(args []string) (*Reading, error) {
	flags := flag.NewFlagSet("read", flag.ExitOnError)
	blob := flags.String("blob", "", "the layer")
	toc := flags.String("toc", "", "the digest that its table of contents must have")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(*blob)
	if err != nil {
		return nil, err
	}
	section := io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data)))
	r, err := estargz.Open(section, estargz.WithDecompressors(new(zstdchunked.Decompressor)))
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	if got := r.TOCDigest(); got.String() != *toc {
		return nil, fmt.Errorf("the TOC is %s, not %s", got, *toc)
	}
	reading := &Reading{Names: []string{}, Files: []File{}}
	if _, err := r.VerifyTOC(digest.Digest(*toc)); err != nil {
		reading.VerifyTOC = err.Error()
	}
	root, ok := r.Lookup("")
	if !ok {
		return nil, errors.New("no root directory")
	}
	if err := walk(r, root, "", reading); err != nil {
		return nil, err
	}
	sort.Strings(reading.Names)
	sort.Slice(reading.Files, func(i, j int) bool { return reading.Files[i].Name < reading.Files[j].Name })
	return reading, nil
}

func walk(r *estargz.Reader, dir *estargz.TOCEntry, prefix string, reading *Reading) error {
	var err error
	dir.ForeachChild(func(base string, e *estargz.TOCEntry) bool {
		name := path.Join(prefix, base)
		reading.Names = append(reading.Names, name)
		switch e.Type {
		case "dir":
			err = walk(r, e, name, reading)
		case "reg":
			var file *File
			if file, err = readFile(r, name, e); err == nil {
				reading.Files = append(reading.Files, *file)
			}
		}
		return err == nil
	})
	return err
}

// readFile reads chunk by chunk and checks each against its digest, as the snapshotter does.
func readFile(r *estargz.Reader, name string, e *estargz.TOCEntry) (*File, error) {
	content, err := r.OpenFile(name)
	if err != nil {
		return nil, err
	}
	file := &File{Name: name, Size: e.Size, Chunks: []Chunk{}}
	whole := digest.SHA256.Digester()
	for offset := int64(0); offset < e.Size; {
		// By the entry's own name: of a hard link, e is the file that it links to.
		c, ok := r.ChunkEntryForOffset(e.Name, offset)
		if !ok {
			return nil, fmt.Errorf("%s: no chunk at %d", name, offset)
		}
		want := c.ChunkDigest
		if want == "" {
			want = c.Digest
		}
		data := make([]byte, c.ChunkSize)
		if _, err := content.ReadAt(data, c.ChunkOffset); err != nil && err != io.EOF {
			return nil, fmt.Errorf("%s: chunk at %d: %w", name, offset, err)
		}
		if got := digest.FromBytes(data); got.String() != want {
			return nil, fmt.Errorf("%s: chunk at %d is %s, not %s", name, offset, got, want)
		}
		whole.Hash().Write(data)
		file.Chunks = append(file.Chunks, Chunk{
			Offset: c.Offset, NextOffset: c.NextOffset(), InnerOffset: c.InnerOffset,
			Size: c.ChunkSize, Digest: want,
		})
		offset = c.ChunkOffset + c.ChunkSize
	}
	file.Sha256 = whole.Digest().Encoded()
	return file, nil
}

func write(args []string) (*Writing, error) {
	flags := flag.NewFlagSet("write", flag.ExitOnError)
	tarName := flags.String("tar", "", "the tar to convert")
	blobName := flags.String("blob", "", "the layer to write")
	chunkSize := flags.Int("chunk-size", 0, "uncompressed bytes per chunk; 0 means the default")
	minChunkSize := flags.Int("min-chunk-size", 0, "compressed bytes per member, at least")
	useZstd := flags.Bool("zstd", false, "write zstd:chunked")
	prioritized := flags.String("prioritized", "", "comma-separated names")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(*tarName)
	if err != nil {
		return nil, err
	}
	options := []estargz.Option{
		estargz.WithChunkSize(*chunkSize), estargz.WithMinChunkSize(*minChunkSize),
	}
	if *useZstd {
		options = append(options, estargz.WithCompression(&zstdCompression{
			&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault},
			new(zstdchunked.Decompressor),
		}))
	}
	if *prioritized != "" {
		options = append(options, estargz.WithPrioritizedFiles(strings.Split(*prioritized, ",")))
	}
	section := io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data)))
	blob, err := estargz.Build(section, options...)
	if err != nil {
		return nil, err
	}
	layer, err := io.ReadAll(blob)
	if err != nil {
		return nil, err
	}
	if err := blob.Close(); err != nil {
		return nil, err
	}
	size, err := blob.UncompressedSize()
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(*blobName, layer, 0o644); err != nil {
		return nil, err
	}
	return &Writing{blob.TOCDigest().String(), blob.DiffID().String(), size}, nil
}
