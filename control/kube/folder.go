package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// maxFile bounds one file, in bytes.
const maxFile = 16 << 20

// FolderConfig is what NewFolder needs.
type FolderConfig struct {
	// Dir holds .yaml, .yml and .json files; its subfolders are not read, nor
	// files whose name begins with a dot.
	Dir string
	// Quiet is how long nothing must have changed before the objects are told,
	// at most five times as long after the first change. 0 means 10 ms.
	Quiet time.Duration
	// Grace is how long the first word waits for a file that cannot be read: it
	// may be half written, and there is no older state of it. 0 means 2 s.
	Grace time.Duration
	// Registerer gets the metrics. nil means nowhere.
	Registerer prometheus.Registerer
	// Log gets files that cannot be read. nil means nowhere.
	Log *slog.Logger
}

// Folder is a source of objects: a folder of ordinary Kubernetes YAML. A file is
// read when its writer has closed it, or it was moved here. One that cannot be
// read keeps the objects that it had before; a file without objects is one of
// those. Whoever wants to remove objects removes the file.
type Folder struct {
	cfg   FolderConfig
	files map[string]*file
	// told are the objects as they were told last.
	told Set
	bad  prometheus.Gauge
}

// file is what is known of one file.
type file struct {
	objects Objects // of its last good state, what Build reads of them
	err     error   // why its present state is not good
}

// NewFolder starts nothing.
func NewFolder(cfg FolderConfig) *Folder {
	if cfg.Quiet == 0 {
		cfg.Quiet = 10 * time.Millisecond
	}
	if cfg.Grace == 0 {
		cfg.Grace = 2 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	f := &Folder{cfg: cfg, files: make(map[string]*file), bad: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tacit_control_source_bad_files",
		Help: "Files of the source folder that cannot be read; what they held before still counts.",
	})}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(f.bad)
	}
	return f
}

// Run reads the folder, calls apply with all objects, and after that with what has
// changed, never twice at the same time. It returns nil when ctx ended, and an
// error when the folder cannot be watched any more.
func (f *Folder) Run(ctx context.Context, apply func([]Event)) error {
	w, err := watch(f.cfg.Dir)
	if err != nil {
		return fmt.Errorf("watch folder %s: %w", f.cfg.Dir, err)
	}
	defer w.close()
	stop := context.AfterFunc(ctx, w.interrupt)
	defer stop()
	if err := f.run(w, apply); ctx.Err() == nil {
		return fmt.Errorf("watch folder %s: %w", f.cfg.Dir, err)
	}
	return nil
}

func (f *Folder) run(w *watcher, apply func([]Event)) error {
	if err := f.first(w); err != nil {
		return err
	}
	apply(f.changes())
	for {
		names, err := w.next(time.Time{}, f.cfg.Quiet)
		if err != nil {
			return err
		}
		if err := f.read(names); err != nil {
			return err
		}
		if events := f.changes(); len(events) > 0 {
			apply(events)
		}
	}
}

// changes are what the folder says otherwise than when it was asked last.
func (f *Folder) changes() []Event {
	before := f.told
	f.told = f.objects().Set()
	return before.To(f.told)
}

// first reads everything, and gives files that cannot be read a while to become
// better: without them their pods would seem to be gone.
func (f *Folder) first(w *watcher) error {
	end := time.Now().Add(f.cfg.Grace)
	for names := all; ; {
		if err := f.read(names); err != nil || f.countBad() == 0 {
			return err
		}
		var err error
		if names, err = w.next(end, f.cfg.Quiet); errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// read reads the files of these names again; all stands for the whole folder.
func (f *Folder) read(names []string) error {
	if slices.Contains(names, all[0]) {
		entries, err := os.ReadDir(f.cfg.Dir)
		if err != nil {
			return err
		}
		names = slices.Collect(maps.Keys(f.files))
		for _, e := range entries {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		if isSource(name) {
			f.readFile(name)
		}
	}
	f.bad.Set(float64(f.countBad()))
	return nil
}

func isSource(name string) bool {
	ext := filepath.Ext(name)
	return !strings.HasPrefix(name, ".") && (ext == ".yaml" || ext == ".yml" || ext == ".json")
}

func (f *Folder) readFile(name string) {
	path := filepath.Join(f.cfg.Dir, name)
	objects, err := decodeFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		delete(f.files, name)
		return
	}
	known := f.files[name]
	if known == nil {
		known = &file{}
		f.files[name] = known
	}
	if known.err = err; err != nil {
		f.cfg.Log.Error("file not understood, what it held before still counts", "file", path, "error", err)
		return
	}
	known.objects = objects.kept()
}

func decodeFile(path string) (Objects, error) {
	// What is not a file is not there: opening a pipe would wait for its writer.
	if info, err := os.Stat(path); err != nil {
		return Objects{}, err
	} else if !info.Mode().IsRegular() {
		return Objects{}, fs.ErrNotExist
	}
	r, err := os.Open(path)
	if err != nil {
		return Objects{}, err
	}
	defer r.Close()
	content, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return Objects{}, err
	}
	if len(content) > maxFile {
		return Objects{}, fmt.Errorf("it has more than %d bytes", maxFile)
	}
	return Decode(content)
}

func (f *Folder) countBad() (n int) {
	for _, file := range f.files {
		if file.err != nil {
			n++
		}
	}
	return n
}

// objects joins the files in the order of their names.
func (f *Folder) objects() Objects {
	var o Objects
	seen := make(map[string]bool)
	for _, name := range slices.Sorted(maps.Keys(f.files)) {
		for _, key := range o.append(f.files[name].objects, seen) {
			f.cfg.Log.Error("object stands in two files, the first counts", "object", key, "file", name)
		}
	}
	return o
}
