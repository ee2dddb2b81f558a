package kube

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// all stands for every name in the folder.
var all = []string{""}

// watcher tells which names of one folder changed. One goroutine uses it.
type watcher struct {
	dir    string
	events *os.File
}

// watch begins at once: what changes after it returned is told by next. A file is
// told when its writer closed it, not while it is written.
func watch(dir string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify_init1: %w (see fs.inotify.max_user_instances)", err)
	}
	w := &watcher{dir, os.NewFile(uintptr(fd), "inotify")}
	const mask = unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE |
		unix.IN_CREATE | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
	if _, err := unix.InotifyAddWatch(fd, dir, mask); err != nil {
		return nil, errors.Join(fmt.Errorf("inotify_add_watch: %w", err), w.close())
	}
	return w, nil
}

func (w *watcher) close() error { return w.events.Close() }

// interrupt makes next return, now and for ever.
func (w *watcher) interrupt() { w.close() }

// next waits for a change, until end if that is not zero (os.ErrDeadlineExceeded),
// then for more until nothing has changed for quiet, at most five times as long.
// A name may be told twice.
func (w *watcher) next(end time.Time, quiet time.Duration) ([]string, error) {
	names, err := w.read(end)
	if err != nil {
		return nil, err
	}
	last := time.Now().Add(5 * quiet)
	for {
		until := time.Now().Add(quiet)
		if until.After(last) {
			until = last
		}
		more, err := w.read(until)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return names, nil
		}
		if err != nil {
			return nil, err
		}
		names = append(names, more...)
	}
}

// read returns the names of the next batch of events.
func (w *watcher) read(end time.Time) ([]string, error) {
	if err := w.events.SetReadDeadline(end); err != nil {
		return nil, err
	}
	// At least one event always fits: inotify(7).
	buf := make([]byte, 16<<10)
	n, err := w.events.Read(buf)
	if err != nil {
		return nil, err
	}
	return w.names(buf[:n])
}

// names reads struct inotify_event: wd, mask, cookie, len, name[len].
func (w *watcher) names(buf []byte) (names []string, err error) {
	for len(buf) >= unix.SizeofInotifyEvent {
		mask := binary.NativeEndian.Uint32(buf[4:])
		size := int(binary.NativeEndian.Uint32(buf[12:]))
		name := buf[unix.SizeofInotifyEvent:][:size]
		buf = buf[unix.SizeofInotifyEvent+size:]
		switch {
		case mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_IGNORED|unix.IN_UNMOUNT) != 0:
			return nil, errors.New("the folder itself was moved or removed")
		case mask&unix.IN_Q_OVERFLOW != 0:
			names = append(names, all...)
		default:
			names = append(names, w.changed(string(bytes.TrimRight(name, "\x00")), mask)...)
		}
	}
	return names, nil
}

// changed tells what to read after an event at name. A new file is read when it
// is closed; only for links their creation is all that happens. A volume of
// Kubernetes swaps one link, ..data, behind all of its files.
func (w *watcher) changed(name string, mask uint32) []string {
	switch {
	case strings.HasPrefix(name, ".."):
		return all
	case mask&unix.IN_CREATE != 0 && !w.isLink(name):
		return nil
	default:
		return []string{name}
	}
}

func (w *watcher) isLink(name string) bool {
	var st unix.Stat_t
	err := unix.Lstat(filepath.Join(w.dir, name), &st)
	return err == nil && (st.Mode&unix.S_IFMT == unix.S_IFLNK || st.Nlink > 1)
}
