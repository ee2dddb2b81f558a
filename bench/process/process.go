// Package process reads of processes what a bench compares: CPU time and memory, as
// the kernel counts them. It starts and ends none.
package process

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// ticks per second in /proc/PID/stat (USER_HZ), the same on all architectures
// that Go runs on.
const ticks = 100

// Process is one that is measured.
type Process struct {
	PID  int
	Name string // proxy n1, splice client
}

// CPU returns the seconds that the process has used, in user mode and in the
// kernel.
func (p Process) CPU() (float64, error) {
	stat, err := readStat(p.PID)
	if err != nil {
		return 0, fmt.Errorf("CPU time of %s: %w", p.Name, err)
	}
	return float64(stat.ticks) / ticks, nil
}

// RSS returns the resident bytes.
func (p Process) RSS() (float64, error) { return p.memory("VmRSS:") }

// Peak returns the most resident bytes that it had so far.
func (p Process) Peak() (float64, error) { return p.memory("VmHWM:") }

func (p Process) memory(which string) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	if err != nil {
		return 0, fmt.Errorf("memory of %s: %w", p.Name, err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == which {
			kib, err := strconv.Atoi(f[1])
			return float64(kib) * 1024, err
		}
	}
	return 0, fmt.Errorf("memory of %s: no %s in its status", p.Name, which)
}

// CPU sums the seconds of several processes.
func CPU(ps []Process) (float64, error) {
	sum := 0.0
	for _, p := range ps {
		s, err := p.CPU()
		if err != nil {
			return 0, err
		}
		sum += s
	}
	return sum, nil
}

// Descendants returns all processes below root, with their command lines.
func Descendants(root int) (map[int][]string, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	parent := map[int]int{}
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil {
			continue
		}
		stat, err := readStat(pid)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		parent[pid] = stat.parent
	}
	found := map[int][]string{}
	for pid := range parent {
		if isBelow(pid, root, parent) {
			found[pid] = commandLine(pid)
		}
	}
	return found, nil
}

func isBelow(pid, root int, parent map[int]int) bool {
	for pid > 1 {
		if pid = parent[pid]; pid == root {
			return true
		}
	}
	return false
}

func commandLine(pid int) []string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
}

type stat struct {
	parent int
	ticks  int
}

func readStat(pid int) (stat, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, os.ErrProcessDone) || errors.Is(err, fs.ErrNotExist) {
		return stat{}, fs.ErrNotExist
	}
	if err != nil {
		return stat{}, err
	}
	return parseStat(text)
}

// parseStat reads /proc/PID/stat (proc_pid_stat(5)). The second field is a name in
// parentheses, in which anything may stand.
func parseStat(text []byte) (stat, error) {
	end := bytes.LastIndexByte(text, ')')
	f := strings.Fields(string(text[end+1:]))
	if end < 0 || len(f) < 13 {
		return stat{}, fmt.Errorf("parse stat %q: too few fields", text)
	}
	var n [3]int
	for i, field := range []int{4 - 3, 14 - 3, 15 - 3} { // f begins with field 3
		var err error
		if n[i], err = strconv.Atoi(f[field]); err != nil {
			return stat{}, fmt.Errorf("parse stat %q: %w", text, err)
		}
	}
	return stat{parent: n[0], ticks: n[1] + n[2]}, nil
}
