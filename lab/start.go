package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Names inside of a lab's folder, and the folder's name inside the lab.
const (
	inside     = "/run/lab"
	netnsDir   = "/run/netns"
	scratchDir = "/run/scratch" // for applications' files; in memory, anybody's
	socketName = "lab.sock"
	pidName    = "lab.pid"
	wordsName  = "lab.err" // what a lab says that is not leashed
	runName    = "run"
)

// StartConfig says how a lab is started.
type StartConfig struct {
	// Program is the tacit program (or a test binary that serves as it).
	Program string
	// Dir is the lab's folder, as Folder names it. It is made, and must not be in
	// use by another lab.
	Dir string
	// Options are key=value words, see Options.
	Options []string
	// Leashed ties the lab's life to this process: it dies with it, however that
	// ends. Otherwise the lab stays until it is taken down.
	Leashed bool
	// Stderr takes what the lab itself says; nil discards it. A lab that is not leashed
	// outlives its starter and does not keep Stderr: it writes to wordsName in Dir, and
	// Stderr takes that if it does not come up.
	Stderr *os.File
}

// Folder is where the lab of that name keeps its files: logs, objects, captures.
// The name is a person's choice, "" is "default".
func Folder(name string) string {
	if name == "" {
		name = "default"
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("tacit-lab-%d", os.Getuid()), name)
}

// Started is a lab that answers. Wait returns when its first process has ended.
type Started struct {
	// Process is the lab's first process: to kill it is to end all of the lab.
	Process *os.Process
	done    chan struct{}
	err     error
}

// Wait blocks until the lab is gone. It may be called more than once.
func (s *Started) Wait() error {
	<-s.done
	return s.err
}

// Start makes a lab and returns when it takes verbs. It may be called from
// several goroutines for different folders.
func Start(ctx context.Context, cfg StartConfig) (*Started, error) {
	if err := prepareFolder(cfg.Dir); err != nil {
		return nil, err
	}
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer readyR.Close()
	words, err := cfg.words()
	if err != nil {
		readyW.Close()
		return nil, err
	}
	s := &Started{done: make(chan struct{})}
	started := make(chan error, 1)
	go s.keep(initCommand(cfg, words, readyW), started)
	err = <-started
	readyW.Close()
	if !cfg.Leashed {
		defer words.Close()
	}
	if err != nil {
		return nil, explainStart(err)
	}
	stop := context.AfterFunc(ctx, func() { s.Process.Kill() })
	defer stop()
	if err := awaitReady(readyR); err != nil {
		s.Process.Kill()
		err = errors.Join(fmt.Errorf("start lab in %s: %w", cfg.Dir, err), s.Wait())
		if !cfg.Leashed {
			cfg.retell(words)
		}
		return nil, err
	}
	pid := fmt.Sprintf("%d\n", s.Process.Pid)
	return s, os.WriteFile(filepath.Join(cfg.Dir, pidName), []byte(pid), 0o600)
}

// keep starts the lab's first process and waits for it, on one thread all the
// time: the parent-death signal comes when that thread ends, not the process.
func (s *Started) keep(cmd *exec.Cmd, started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(s.done)
	err := cmd.Start()
	s.Process = cmd.Process
	started <- err
	if err == nil {
		s.err = cmd.Wait()
	}
}

// words is where the lab says something. Who reads a pipe until its end, as in
// tacit lab up | cat, must not wait for the end of the lab.
func (cfg StartConfig) words() (*os.File, error) {
	if cfg.Leashed {
		return cfg.Stderr, nil
	}
	return os.OpenFile(filepath.Join(cfg.Dir, wordsName), os.O_CREATE|os.O_TRUNC|os.O_RDWR|os.O_APPEND, 0o600)
}

// retell brings to Stderr what the lab has said.
func (cfg StartConfig) retell(words *os.File) {
	if cfg.Stderr == nil {
		return
	}
	if _, err := words.Seek(0, io.SeekStart); err == nil {
		_, _ = io.Copy(cfg.Stderr, io.LimitReader(words, 1<<20)) // why it ended is told all the same
	}
}

func initCommand(cfg StartConfig, words, ready *os.File) *exec.Cmd {
	root := filepath.Join(cfg.Dir, runName)
	cmd := exec.Command(cfg.Program, append([]string{"lab", "init", root}, cfg.Options...)...)
	if words != nil {
		cmd.Stdout, cmd.Stderr = words, words
	}
	cmd.ExtraFiles = []*os.File{ready}
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	if cfg.Leashed {
		attr.Pdeathsig = syscall.SIGKILL
	} else {
		attr.Setsid = true
	}
	if !privileged() {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	cmd.SysProcAttr = attr
	return cmd
}

// privileged reports whether namespaces can be made without a user namespace.
func privileged() bool {
	var data [2]unix.CapUserData
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	const need = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN
	return os.Geteuid() == 0 && data[0].Effective&need == need
}

func explainStart(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("start lab: %w: this needs root, or user namespaces for ordinary users"+
			" (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)", err)
	}
	return fmt.Errorf("start lab: %w", err)
}

func awaitReady(r io.Reader) error {
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		return errors.New("it ended before it was ready; its own words are above or in lab.log")
	}
	if line = strings.TrimSpace(line); line != "ready" {
		return errors.New(line)
	}
	return nil
}

// prepareFolder makes the folder, private to its owner. What lies below runName
// is bound to /run/lab inside the lab, where the proxy's user may pass.
func prepareFolder(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Lstat(filepath.Dir(dir))
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != os.Getuid() && st.Uid != 0 || !info.IsDir() {
		return fmt.Errorf("folder %s belongs to somebody else: remove it, or set TMPDIR", filepath.Dir(dir))
	}
	if Alive(dir) {
		return fmt.Errorf("a lab is already up in %s: take it down first (tacit lab down), or give another --name", dir)
	}
	if err := os.RemoveAll(filepath.Join(dir, runName)); err != nil {
		return err
	}
	run := filepath.Join(dir, runName)
	if err := os.Mkdir(run, 0o755); err != nil {
		return err
	}
	return os.Chmod(run, 0o755)
}
