// SPDX-License-Identifier: Apache-2.0
// What MindSpore's libraries use of CANN's graph engine while they are loaded: a table of error codes, filled by inline
// code of the engine's header and never read, and a registry of operators. Nothing of the engine itself is emulated: a
// program that builds a graph aborts, with the name of the function that it called.
//
// Compiled for the older ABI of the C++ library, as CANN is. The table is declared anew, because the header of today
// defines it inline.
#include <cstdint>
#include <map>
#include <string>

#include "graph/operator.h"
#include "graph/operator_factory.h"

namespace ge {

class StatusFactory {
public:
    static StatusFactory *Instance();

protected:
    StatusFactory() = default;
    ~StatusFactory() = default;

private:
    std::map<uint32_t, std::string> err_desc_;
};

StatusFactory *StatusFactory::Instance()
{
    static StatusFactory *one = new StatusFactory; // never destroyed: libraries are unloaded in an order of their own
    return one;
}

// Asked before an operator of the older interface is run, which refuses by itself what it does not know.
bool OperatorFactory::IsExistOp(const char *)
{
    return true;
}

// An operator without anything in it: its caller only looks whether there is one.
Operator OperatorFactory::CreateOperator(const char *, const char *)
{
    return Operator();
}

} // namespace ge
