package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Call is one verb for a lab.
type Call struct {
	// Dir is the lab's folder.
	Dir string
	// Args are the verb and its words.
	Args []string
	// WorkDir is what relative paths in Args are relative to; "" means the
	// process's own.
	WorkDir string
	// Not asks for absence, where a verb looks for something.
	Not bool
	// Stdin, Stdout and Stderr are handed to the lab; they stay the caller's.
	Stdin, Stdout, Stderr *os.File
}

// Do has the lab carry out one verb and returns its exit code. An error is one of
// asking; what the verb has to say goes to Stderr. The end of ctx cancels the verb.
func Do(ctx context.Context, call Call) (code int, err error) {
	c, err := dialLab(ctx, call.Dir)
	if err != nil {
		return 1, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	wd, err := filepath.Abs(call.WorkDir)
	if err != nil {
		return 1, err
	}
	r := request{Args: call.Args, Dir: wd, Not: call.Not}
	if err := sendRequest(c, r, []*os.File{call.Stdin, call.Stdout, call.Stderr}); err != nil {
		return 1, fmt.Errorf("ask the lab to %s: %w", strings.Join(call.Args, " "), err)
	}
	var answer reply
	if err := json.NewDecoder(c).Decode(&answer); err != nil {
		return 1, fmt.Errorf("answer of the lab to %s: %w", strings.Join(call.Args, " "), errors.Join(err, ctx.Err()))
	}
	if answer.Error != "" {
		fmt.Fprintln(call.Stderr, answer.Error)
	}
	return answer.Code, nil
}

func dialLab(ctx context.Context, dir string) (*net.UnixConn, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	c, err := d.DialContext(ctx, "unix", filepath.Join(dir, runName, socketName))
	if err != nil {
		return nil, fmt.Errorf("no lab is up in %s (%w): start one with: tacit lab up", dir, err)
	}
	return c.(*net.UnixConn), nil
}

// Alive reports whether the lab of that folder has a living first process.
func Alive(dir string) bool {
	fd, err := openLab(dir)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// openLab returns a pidfd of the lab's first process. A number that was given to
// another process since is recognized by its command line.
func openLab(dir string) (int, error) {
	text, err := os.ReadFile(filepath.Join(dir, pidName))
	if err != nil {
		return -1, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return -1, fmt.Errorf("%s: %w", filepath.Join(dir, pidName), err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(line), "\x00lab\x00init\x00") {
		unix.Close(fd)
		return -1, errors.New("no lab")
	}
	return fd, nil
}

// Down ends the lab and removes its folder. The processes are killed as a whole;
// it is no error if there is no lab.
func Down(ctx context.Context, dir string) error {
	if fd, err := openLab(dir); err == nil {
		defer unix.Close(fd)
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("end the lab in %s: %w", dir, err)
		}
		if err := awaitPidfd(ctx, fd); err != nil {
			return fmt.Errorf("wait for the end of the lab in %s: %w", dir, err)
		}
	}
	return os.RemoveAll(dir)
}

func awaitPidfd(ctx context.Context, fd int) error {
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 100)
		if n == 1 || err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}
