package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a step that must succeed may fail.
const patience = 2 * time.Minute

// Serve runs the steps of the plan in that file, and keeps running what is to be
// kept, until ctx ends or a step cannot succeed.
func Serve(ctx context.Context, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	plan, err := receive(f)
	f.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	raiseFileLimit()
	ctx, cancel := context.WithCancel(ctx)
	var kept sync.WaitGroup
	defer kept.Wait()
	defer cancel()
	for _, s := range plan.Steps {
		if s.Keep {
			kept.Go(func() { s.keep(ctx) })
			continue
		}
		if err := s.succeed(ctx); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return nil
}

// keep runs the process again whenever it has ended: a kubelet or a controller
// manager that comes before the API server ends, and is to come again.
func (s Step) keep(ctx context.Context) {
	pause := 50 * time.Millisecond
	for ctx.Err() == nil {
		begin := time.Now()
		err := s.run(ctx)
		fmt.Fprintf(os.Stderr, "%s ended after %s: %v\n", s.Name, time.Since(begin).Round(time.Millisecond), err)
		pause = min(2*pause, time.Second)
		if time.Since(begin) > 10*time.Second {
			pause = 50 * time.Millisecond
		}
		sleep(ctx, pause)
	}
}

// succeed runs the process until it succeeds: its service may not listen yet.
func (s Step) succeed(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := s.run(ctx)
		if err == nil {
			return nil
		}
		sleep(ctx, 20*time.Millisecond)
		if ctx.Err() != nil {
			return fmt.Errorf("%s, see %s: %w", s.Name, s.Log, errors.Join(err, ctx.Err()))
		}
	}
}

func (s Step) run(ctx context.Context) error {
	log, err := os.OpenFile(s.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, s.Command[0], s.Command[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	return cmd.Run()
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// raiseFileLimit lifts the soft limit of descriptors to the hard one. Setting it
// makes children inherit it; Go would give them the soft limit back.
func raiseFileLimit() {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: l.Max, Max: l.Max}) // the old one serves too
	}
}
