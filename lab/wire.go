package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// A request is one verb, sent as one JSON line together with three descriptors
// (standard input, output and error of whoever asks) over one connection. The
// answer is one JSON line; closing the connection before it cancels the verb.
type request struct {
	// Args are the verb and its words.
	Args []string `json:"args"`
	// Dir is what relative paths are relative to.
	Dir string `json:"dir"`
	// Not is the story's "!": for verbs that look for something, absence is
	// asked for.
	Not bool `json:"not,omitempty"`
}

type reply struct {
	// Code is an exit code; 0 is success.
	Code  int    `json:"code"`
	Error string `json:"error,omitempty"`
}

const maxRequest = 1 << 20

// sendRequest sends r and files, which stay the caller's.
func sendRequest(c *net.UnixConn, r request, files []*os.File) error {
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode request: %w", err)
	}
	if len(text) >= maxRequest {
		return fmt.Errorf("request of %d bytes: at most %d", len(text), maxRequest)
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	text = append(text, '\n')
	n, _, err := c.WriteMsgUnix(text, unix.UnixRights(fds...), nil)
	if err == nil && n < len(text) {
		_, err = c.Write(text[n:])
	}
	return err
}

// receiveRequest reads one request. The files are the caller's to close, also
// when it returns an error.
func receiveRequest(c *net.UnixConn) (r request, files []*os.File, err error) {
	oob := make([]byte, unix.CmsgSpace(3*4))
	buf := make([]byte, 64<<10)
	n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return r, nil, err
	}
	if files, err = rights(oob[:oobn]); err != nil {
		return r, files, err
	}
	text := append([]byte(nil), buf[:n]...)
	for len(text) == 0 || text[len(text)-1] != '\n' {
		if n == 0 || len(text) > maxRequest {
			return r, files, errors.New("request is cut off or too long")
		}
		if n, err = c.Read(buf[:cap(buf)]); err != nil {
			return r, files, err
		}
		text = append(text, buf[:n]...)
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, files, fmt.Errorf("decode request: %w", err)
	}
	if len(files) != 3 || len(r.Args) == 0 {
		return r, files, fmt.Errorf("request with %d words and %d descriptors: want a verb and 3", len(r.Args), len(files))
	}
	return r, files, nil
}

func rights(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parse control message: %w", err)
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, fmt.Errorf("parse descriptors: %w", err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "from-client"))
		}
	}
	return files, nil
}

func sendReply(w io.Writer, r reply) error { return json.NewEncoder(w).Encode(r) }
